"""``prelude train``: its options, output and exit status."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prompt_store.types import check_name
from server.client import tables
from server.client.commands import DEFAULT_URL, EXIT_CODES, ApiKey, ExitStatus, Json, Url, status_of
from server.client.http import ClientError
from server.datasets import DatasetError
from server.errors import ServerError
from server.training.errors import GoldenCheckError, RunDirectoryError, SettingsError
from server.training.reporting.run_report import reporting
from server.training.settings import (
    ALL_LINEAR,
    DEFAULT_ALIAS,
    Device,
    DType,
    Method,
    Monitor,
    ReportTo,
    Task,
    TrainSettings,
)

if TYPE_CHECKING:
    from server.training.trainer import TrainingProgress

app = typer.Typer(add_completion=False)

EXTRA = ("accelerate", "peft")
"""Packages that only training needs; ``pip install 'prelude-server[train]'`` installs them."""

TRACKERS: dict[ReportTo, tuple[str, ...]] = {
    ReportTo.TENSORBOARD: ("tensorboard", "tensorboardX"),
    ReportTo.MLFLOW: ("mlflow",),
    ReportTo.WANDB: ("wandb",),
}
"""The packages of each tracker, of which one is enough."""

_INTERRUPTED = 130
"""The status that shells report for a process ended by SIGINT."""


@app.command("train", epilog=EXIT_CODES)
def train(
    model: Annotated[
        str, typer.Option(help="Hub id, directory that transformers can load, or 'demo' for the embedded model.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Examples: {prompt, completion}, {text, label} or {messages}, in JSON Lines, CSV, TSV, Parquet or a "
            "directory that datasets saved."
        ),
    ],
    name: Annotated[str, typer.Option("--id", help="Name of the soft prompt or adapter.")],
    method: Annotated[Method, typer.Option(help="Training method.")] = Method.PROMPT_TUNING,
    task_type: Annotated[
        Task, typer.Option(help="What to learn: completions, or a classification head over the labels.")
    ] = Task.CAUSAL_LM,
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="Number of virtual tokens.")] = 20,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out examples; default: a share of the data.")] = None,
    eval_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the data to hold out; 0: no evaluation.")
    ] = 0.1,
    description: Annotated[str | None, typer.Option(help="Description of the task; stored with the version.")] = None,
    init_text: Annotated[
        str | None, typer.Option(help="Text to initialise from; default: the description, the labels or the data.")
    ] = None,
    separator: Annotated[
        str, typer.Option(help="Separator between a text and its label; \\n and \\t are escapes.")
    ] = "\\n",
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of initialisation, order and split.")] = 0,
    epochs: Annotated[float, typer.Option(min=0.001, help="Number of passes over the data.")] = 20.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of optimizer steps, instead of epochs.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak learning rate; default: depends on the method.")
    ] = None,
    search: Annotated[
        int, typer.Option(min=0, max=9, help="Number of rates to try in short trainings first; 0: none.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 16,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Forward passes per optimizer step.")] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Use less memory and more time; not for prefix_tuning, p_tuning_v2 and cartridge.",
        ),
    ] = False,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay of AdamW.")] = 0.0,
    warmup_ratio: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the steps used for warm-up.")] = 0.1,
    eval_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations; default: 20 evaluations in all.")
    ] = None,
    patience: Annotated[
        int, typer.Option(min=0, help="Evaluations without improvement before training stops; 0: never.")
    ] = 5,
    monitor: Annotated[Monitor, typer.Option(help="Measure of improvement.")] = "loss",
    encoder_hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Width of the encoder of p_tuning and p_tuning_v2.")
    ] = None,
    num_frozen_tokens: Annotated[
        int, typer.Option(min=0, help="Number of first tokens of a cartridge that are not trained.")
    ] = 1,
    cpt_epsilon: Annotated[
        float, typer.Option(min=0.0, help="Maximum change of a row by CPT, in mean norms of the embeddings.")
    ] = 1.0,
    num_ranks: Annotated[int, typer.Option(min=1, help="Rank of each task's matrix, for multitask.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the changes, for lora.")] = 16,
    lora_alpha: Annotated[
        float | None, typer.Option(min=0.0, help="Numerator of the scale, for lora; default: a scale of 2.")
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="Modules to change, for lora: all-linear, or names such as q_proj,v_proj.")
    ] = ALL_LINEAR,
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Divide the scale by the square root of the rank, for lora.")
    ] = False,
    lora_dropout: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Dropout before the changes in training, for lora.")
    ] = 0.0,
    over: Annotated[
        str | None,
        typer.Option(help="Adapter on the server to train a soft prompt over: NAME, NAME@VERSION or NAME@ALIAS."),
    ] = None,
    device: Annotated[Device, typer.Option(help="Device to train on; auto uses CUDA if available.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Dtype of the frozen model; what is trained is float32.")] = "auto",
    base_name: Annotated[
        str | None, typer.Option(help="Name of the base in the saved configuration; default: the server's name.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Directory for checkpoints and the result; default: runs/ID.")
    ] = None,
    report_to: Annotated[
        list[ReportTo] | None,
        typer.Option(
            help="Also report losses and scores to this tracker, by its own environment variables; repeatable."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the run directory.")] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Publish the result after checking that the server answers as PEFT does.")
    ] = False,
    alias: Annotated[str, typer.Option(help="Alias that --push moves.")] = DEFAULT_ALIAS,
    golden_prompts: Annotated[
        int, typer.Option(min=1, max=64, help="Number of texts to compare with PEFT before publishing.")
    ] = 4,
    golden_tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Maximum difference of a log-probability in nats; default: measured."),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Server that keeps the run and its metrics; default: --url, with --push."),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Report to no server, also with --push.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Train a soft prompt or a LoRA adapter on labelled examples, and publish it."""
    settings = TrainSettings(
        model=model,
        data=data,
        name=_name(name, "id"),
        method=method,
        task_type=task_type,
        num_virtual_tokens=num_virtual_tokens,
        eval_data=eval_data,
        eval_fraction=eval_fraction,
        description=description,
        init_text=init_text,
        separator=separator.replace("\\n", "\n").replace("\\t", "\t"),
        revision=revision,
        seed=seed,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        search=search,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        weight_decay=weight_decay,
        warmup_ratio=warmup_ratio,
        eval_steps=eval_steps,
        patience=patience,
        monitor=monitor,
        encoder_hidden_size=encoder_hidden_size,
        num_frozen_tokens=num_frozen_tokens,
        cpt_epsilon=cpt_epsilon,
        num_ranks=num_ranks,
        rank=rank,
        lora_alpha=lora_alpha,
        target_modules=target_modules,
        use_rslora=use_rslora,
        lora_dropout=lora_dropout,
        over=over,
        device=device,
        dtype=dtype,
        base_name=base_name,
        run_dir=run_dir or Path("runs") / name,
        report_to=tuple(report_to or ()),
        resume=resume,
        push=push,
        url=url,
        alias=_name(alias, "alias"),
        golden_prompts=golden_prompts,
        golden_tolerance=golden_tolerance,
    )
    if report is not None and no_report:
        raise typer.BadParameter("give only one of --report and --no-report")
    report_url = None if no_report else report or (url if push else None)
    with _errors(as_json=as_json):
        result = _run(settings, api_key, report_url)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        tables.show(*tables.training(result))


def _run(settings: TrainSettings, api_key: str | None, report_url: str | None) -> dict[str, Any]:
    """Check settings and data before importing the model libraries."""
    # Imported here because torch takes seconds to import.
    from server.training.corpus import load_corpus  # noqa: PLC0415

    settings.check()
    load_corpus(settings)
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise SettingsError(f"training needs {' and '.join(missing)}: pip install 'prelude-server[train]'")
    for tracker in settings.report_to:
        if all(find_spec(name) is None for name in TRACKERS[tracker]):
            raise SettingsError(f"report_to: {tracker} is not installed: pip install {TRACKERS[tracker][0]}")
    from server.training.run import Reporter, quiet_libraries, train  # noqa: PLC0415

    with (
        quiet_libraries(),
        _reporting() as (show, say),
        reporting(report_url, api_key, settings, say) as report,
    ):

        def warn(text: str) -> None:
            say(f"warning: {text}")
            if report is not None:
                report.warn(text)

        def progress(state: TrainingProgress) -> None:
            show(state)
            if report is not None:
                report.progress(state.step, state.num_steps)

        result = train(settings, Reporter(say, warn, progress), api_key=api_key)
        if report is not None:
            report.complete(result)
        return result


@contextmanager
def _reporting() -> Iterator[tuple[Callable[[TrainingProgress], None], Callable[[str], None]]]:
    """A progress bar on standard error if that is a terminal, otherwise one line per evaluation."""
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(f"prelude: {tables.clean(text)}", markup=False, soft_wrap=True)

    if not sys.stderr.isatty():
        yield _line_per_evaluation(say), say
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda at: progress.update(task, completed=at.step, total=at.num_steps, description=_describe(at)), say


def _line_per_evaluation(say: Callable[[str], None]) -> Callable[[TrainingProgress], None]:
    seen: list[Any] = [None]
    first: list[tuple[int, float]] = []

    def report(state: TrainingProgress) -> None:
        now = time.monotonic()
        if not first:
            first.append((state.step, now))
        if state.held_out is not seen[0]:
            seen[0] = state.held_out
            left = seconds_left(state.step - first[0][0], now - first[0][1], state.num_steps - state.step)
            rest = "" if left is None else f", about {timedelta(seconds=round(left))} left"
            say(f"step {state.step} of {state.num_steps}: {_describe(state)}{rest}")

    return report


def seconds_left(steps: int, seconds: float, num_left: int) -> float | None:
    """The estimated time of the steps that are left, from the time of some steps; None before the second step."""
    return seconds / steps * num_left if steps and num_left else None


def _describe(state: TrainingProgress) -> str:
    text = f"loss {state.loss:.4f}"
    if state.held_out is not None:
        text += f", held out: loss {state.held_out.loss:.4f}, accuracy {state.held_out.accuracy:.3f}"
    return text


@contextmanager
def _errors(*, as_json: bool) -> Iterator[None]:
    """Report errors, one line per fault, and exit with their status."""
    try:
        yield
    except (ServerError, ClientError) as error:
        status, code = _status(error)
        if as_json:
            body = error.body if isinstance(error, ClientError) else None
            described = {"message": str(error), "type": "training_error", "param": None, "code": code}
            typer.echo(json.dumps(body or {"error": described}))
        lines = [f"{code}: {text}" for code, text in error.faults] if isinstance(error, ClientError) else []
        for line in lines or str(error).splitlines():
            typer.echo(f"prelude: {tables.clean(line)}", err=True)
        raise typer.Exit(status) from error
    except KeyboardInterrupt as error:
        typer.echo(
            "prelude: stopped; run the same command with --resume to continue from the last evaluation", err=True
        )
        raise typer.Exit(_INTERRUPTED) from error


def _status(error: ServerError | ClientError) -> tuple[ExitStatus, str]:
    if isinstance(error, ClientError):
        return status_of(error), error.code
    known: dict[type[Exception], tuple[ExitStatus, str]] = {
        DatasetError: (ExitStatus.INVALID, "invalid_data"),
        SettingsError: (ExitStatus.USAGE, "invalid_settings"),
        RunDirectoryError: (ExitStatus.CONFLICT, "conflict"),
        GoldenCheckError: (ExitStatus.FAILED, "golden_check_failed"),
    }
    return known.get(type(error), (ExitStatus.FAILED, "training_failed"))


def _name(text: str, what: str) -> str:
    try:
        return check_name(text, what)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
