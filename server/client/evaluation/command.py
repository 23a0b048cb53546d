"""The commands ``prelude eval`` and ``prelude promote``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from prompt_store.types import DEFAULT_ALIAS, PromptRef
from server.client.bulk.command import Concurrency, check_characters
from server.client.bulk.model_lookup import default_concurrency, resolve_model
from server.client.bulk.sender import SenderError, SendLimits
from server.client.bulk.summary import progress_bar
from server.client.bulk.transport import open_transport
from server.client.commands import (
    DEFAULT_URL,
    EXIT_CODES,
    Alias,
    ApiKey,
    ExitStatus,
    Expect,
    Json,
    Name,
    Url,
    answer,
    checked,
    serving,
)
from server.client.evaluation.evaluator import (
    DEFAULT_MAX_TOKENS,
    AnswerOptions,
    EvaluatedModel,
    EvaluationResult,
    evaluate_model,
)
from server.client.evaluation.report import PictureError, Report, check_drawable, draw
from server.client.evaluation.significance import compare
from server.client.http import ClientError, PreludeClient
from server.client.tables import clean
from server.datasets import DatasetError, Example, LabelledText, digest, read_examples

app = typer.Typer(add_completion=False)

_ENDS = f"{EXIT_CODES} Also for eval: 4 some rows have no answer."
_PROMOTED = f"{EXIT_CODES} Also for promote: 1 the version is not better."

Data = Annotated[Path, typer.Option(help="Labelled examples, in JSON Lines.")]
Separator = Annotated[
    str | None,
    typer.Option(help=r"Separator between a text and its label; default: the one used in training, or a line end."),
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens per answer.")]


@dataclass(frozen=True, slots=True)
class _Data:
    path: Path
    examples: Sequence[Example]
    sha256: str

    @property
    def metric(self) -> str:
        return "accuracy" if isinstance(self.examples[0], LabelledText) else "exact_match"


@app.command("eval", epilog=_ENDS)
def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME, NAME@VERSION or NAME@ALIAS, or the base model.")],
    data: Data,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare with this soft prompt or version.")
    ] = None,
    against_base: Annotated[
        bool, typer.Option("--against-base", help="Compare with the model without a soft prompt.")
    ] = False,
    text_prompt: Annotated[
        str | None, typer.Option(help="Compare with the model given this instruction before each text, or around {}.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the confusion matrices to this PNG file.")
    ] = None,
    separator: Separator = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    stop: Stop = None,
    concurrency: Concurrency = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Score a soft prompt on labelled examples, alone or compared with another."""
    if sum((against is not None, against_base, text_prompt is not None)) > 1:
        raise typer.BadParameter("give only one of --against, --against-base and --text-prompt")
    names = {"NAME": name, "against": against, "text-prompt": text_prompt}
    check_characters(**names, stop=stop, separator=separator)
    with _errors(as_json=as_json), serving(url, api_key, as_json=as_json) as client:
        examples = _read(data)
        if png is not None:
            check_drawable(has_labels=examples.metric == "accuracy")
        options = AnswerOptions(max_tokens=max_tokens, stop=stop or ())
        first = _evaluated_model(client, name, separator)
        others = []
        if against is not None:
            others = [_evaluated_model(client, against, separator)]
        elif against_base or text_prompt is not None:
            base = client.models()[0]["id"]
            called = base if text_prompt is None else f"{base} with a text prompt"
            others = [EvaluatedModel(name=called, model=base, text_prompt=text_prompt, separator=first.separator)]
        limits = SendLimits(concurrency=concurrency or default_concurrency(client, first.model))
        report = _run(examples, [first, *others], options, limits, url, api_key)
    answer(report.as_json, as_json, *report.parts)
    if png is not None:
        try:
            draw(report, png)
        except PictureError as error:  # the report is printed already
            typer.echo(f"prelude: {clean(error)}", err=True)
            raise typer.Exit(ExitStatus.FAILED) from error
    if report.num_errors:
        raise typer.Exit(ExitStatus.INVALID)


@app.command("promote", epilog=_PROMOTED)
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="V", min=1, help="Version to point at.")],
    alias: Alias = DEFAULT_ALIAS,
    expect: Expect = None,
    if_better_than: Annotated[
        str | None, typer.Option(metavar="ALIAS|V", help="Only if its score on --data is higher than this version's.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled examples for --if-better-than.")] = None,
    significant: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="And only if McNemar's p-value is below this."),
    ] = None,
    separator: Separator = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    stop: Stop = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Point an alias at a version, optionally on a condition. Running requests keep their version."""
    checked(name, "name")
    checked(alias, "alias")
    if (if_better_than is None) != (data is None):
        raise typer.BadParameter("--if-better-than and --data must be given together")
    if significant is not None and data is None:
        raise typer.BadParameter("--significant needs --if-better-than and --data")
    evaluation = None
    with _errors(as_json=as_json), serving(url, api_key, as_json=as_json) as client:
        if if_better_than is not None and data is not None:
            rival = f"{name}@{if_better_than}"
            try:
                PromptRef.parse(rival)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            # Read the alias first: if it moves during the evaluation, the promotion is refused.
            now = client.prompt(name)["aliases"].get(alias)
            expect = now if expect is None else expect
            examples = _read(data)
            options = AnswerOptions(max_tokens=max_tokens, stop=stop or ())
            first, second = (_evaluated_model(client, one, separator) for one in (f"{name}@{version}", rival))
            if first.model == second.model:
                _refuse(f"{name}@{if_better_than} is already version {version}: there is nothing to compare", as_json)
            limits = SendLimits(concurrency=default_concurrency(client, first.model))
            report = _run(examples, [first, second], options, limits, url, api_key)
            evaluation = report.as_json
            reason = _why_not(report, significant)
            if reason is not None:
                _refuse(f"{name}@{alias} was not moved: {reason}", as_json, evaluation)
        reply = client.set_alias(name, alias, version, expected=expect)
    if evaluation is not None:
        reply = {**reply, "evaluation": evaluation}
    answer(reply, as_json, f"{name}@{alias} is version {reply['version']}")


def _why_not(report: Report, significant: float | None) -> str | None:
    """Why the first model is not better; None if it is."""
    (ours, theirs), found = report.scores, report.comparison
    if found is None:
        raise TypeError("two models are compared")
    metric, names = report.metric.replace("_", " "), report.names
    scores = f"{metric} {ours.accuracy:.4f} for {names[0]} against {theirs.accuracy:.4f} for {names[1]}"
    rows = f"on {found.num_rows} rows"
    if report.num_errors:
        error = next(error for error in report.first_errors if error is not None)
        return f"{report.num_errors} rows have no answer ({error})"
    if found.only_first <= found.only_second:
        return f"{scores} {rows} is not better"
    if significant is not None and found.p_value >= significant:
        return (
            f"{scores} {rows} is not significant: McNemar's p-value is {found.p_value:.3g}, not below {significant:g}"
        )
    return None


def _refuse(reason: str, as_json: bool, evaluation: Mapping[str, Any] | None = None) -> None:
    if as_json:
        error = {"message": reason, "type": "client_error", "param": None, "code": "not_better"}
        typer.echo(json.dumps({"error": error, "evaluation": evaluation}))
    typer.echo(f"prelude: {clean(reason)}", err=True)
    raise typer.Exit(ExitStatus.FAILED)


def _read(path: Path) -> _Data:
    return _Data(path, read_examples(path), digest(path))


def _evaluated_model(client: PreludeClient, name: str, separator: str | None) -> EvaluatedModel:
    """Resolve a name to a model to evaluate."""
    found = resolve_model(client, name)
    record: Mapping[str, Any] = found.record or {}
    if separator is None:
        separator = _trained_with(record) or "\n"
    return EvaluatedModel(
        name=found.model,
        model=found.model,
        has_head=found.has_head,
        has_tasks=bool(record.get("num_tasks")),
        separator=separator,
    )


def _trained_with(record: Mapping[str, Any]) -> str | None:
    """The separator recorded by ``prelude train``; None if the adapter was trained otherwise."""
    value: Any = record.get("metadata")
    for key in ("training", "settings", "separator"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None


def _run(
    data: _Data,
    models: Sequence[EvaluatedModel],
    options: AnswerOptions,
    limits: SendLimits,
    url: str,
    api_key: str | None,
) -> Report:
    """Score the models one after another."""

    async def score_all() -> list[EvaluationResult]:
        found = []
        async with open_transport(url, api_key) as http:
            for evaluated in models:
                with progress_bar(evaluated.name, len(data.examples), 0) as on_rows:
                    found.append(await evaluate_model(data.examples, evaluated, options, http, limits, on_rows))
        return found

    try:
        found = uvloop.run(score_all())
    except SenderError as error:
        raise ClientError(str(error), status=error.status, code=error.code) from error
    scores = [answers.scores for answers in found]
    return Report(
        data=str(data.path),
        sha256=data.sha256,
        metric=data.metric,
        names=[evaluated.name for evaluated in models],
        scores=scores,
        first_errors=[answers.first_error for answers in found],
        comparison=compare(scores[0].right, scores[1].right) if len(scores) > 1 else None,
    )


@contextmanager
def _errors(*, as_json: bool) -> Iterator[None]:
    """Report invalid data or a failed picture, one line per fault, and exit."""
    try:
        yield
    except (DatasetError, PictureError) as error:
        is_data = isinstance(error, DatasetError)
        if as_json:
            code = "invalid_data" if is_data else "local"
            body = {"message": str(error), "type": "client_error", "param": None, "code": code}
            typer.echo(json.dumps({"error": body}))
        for line in str(error).splitlines():
            typer.echo(f"prelude: {clean(line)}", err=True)
        raise typer.Exit(ExitStatus.INVALID if is_data else ExitStatus.FAILED) from error
