"""A whole training run: from the data files to a saved, scored and published soft prompt."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from prompt_store.formats import FORMAT_FILE
from server.client.http import PreludeClient
from server.demo import DEMO_MODEL, DEMO_NAME
from server.errors import ConfigurationError
from server.model_source import locate
from server.training.corpus import Corpus, beginning_of_data, initial_text, load_corpus
from server.training.encoding import Encoded, Encoder
from server.training.errors import SettingsError, TrainingError
from server.training.heads.classifier import load_classifier
from server.training.heads.scoring import score_classes
from server.training.over import Over, add_over, find_over
from server.training.peft_methods import (
    load_adapter,
    make_peft_model,
    remove_adapter,
    restore,
    save_adapter,
    state_of,
)
from server.training.publish import Publisher
from server.training.rates.recovery import train_steadily
from server.training.rates.search import FILE as SEARCH_FILE
from server.training.rates.search import SHARE, find_rate
from server.training.recorded_format import recorded_format
from server.training.reporting.curves import draw_curves
from server.training.reporting.result_warnings import result_warnings
from server.training.run_directory import RunDirectory, library_versions
from server.training.scoring import CompletionScores, score
from server.training.settings import TrainSettings
from server.training.trainer import (
    OnProgress,
    SoftPromptTrainer,
    num_steps,
    seconds_per_step,
    steps_between_evaluations,
)

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Reporter:
    """Callbacks that report on a training.

    Attributes:
        say: Called with a line of information.
        warn: Called with a warning.
        on_progress: Called after each step and each evaluation.
    """

    say: Callable[[str], None]
    warn: Callable[[str], None]
    on_progress: OnProgress


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide progress bars, logs and warnings of the libraries; the user of the command could not act on them."""
    logging: Any = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def train(settings: TrainSettings, reporter: Reporter, *, api_key: str | None = None) -> dict[str, Any]:
    """Train, and publish if the settings say so.

    Data, settings, run directory and server are checked before the model is loaded, and the server's model is
    compared with the local one before the first step.

    Args:
        settings: The settings of the training.
        reporter: Callbacks that report on it.
        api_key: API key of the server, if it needs one.

    Returns:
        The contents of ``result.json``.

    Raises:
        DatasetError: If the data cannot be used.
        TrainingError: If anything else is wrong.
        ClientError: If the server cannot be reached or rejects a request.
    """
    settings.check()
    corpus = load_corpus(settings)
    for warning in corpus.warnings:
        reporter.warn(warning)
    path = str(DEMO_MODEL) if settings.model == DEMO else _located(settings.model, settings.revision)
    config, tokenizer = _config_and_tokenizer(path, settings.revision)
    max_tokens = _max_tokens(config)
    if settings.num_positions >= max_tokens:
        raise SettingsError(
            f"num_virtual_tokens is {settings.num_virtual_tokens}, but the context has only {max_tokens} tokens"
        )
    labels = corpus.labels if settings.has_head else ()
    encoder = Encoder(tokenizer, _eos_token_ids(path, config, settings.revision), settings.separator, labels)
    limits = {"max_tokens": max_tokens, "num_virtual_tokens": settings.num_positions}
    encoded = encoder.encode_all(settings.data, corpus.train, **limits)
    held_out = encoder.encode_all(corpus.held_out_path, corpus.held_out, **limits)
    directory = RunDirectory(settings.run_dir)
    client = PreludeClient(settings.url, api_key=api_key) if settings.push or settings.over else None
    with client or nullcontext():
        over = None if client is None or settings.over is None else find_over(client, settings.over)
        publisher = None
        if client is not None and settings.push:
            publisher = Publisher(client, settings, directory, over=over)
            publisher.check_server(encoder, (corpus.held_out or corpus.train)[: settings.golden_prompts])
            if publisher.max_model_len < max_tokens:
                limits["max_tokens"] = publisher.max_model_len
                encoder.encode_all(settings.data, corpus.train, **limits)
                encoder.encode_all(corpus.held_out_path, corpus.held_out, **limits)
        record = {
            "settings": settings.to_json(),
            "digests": corpus.digests | ({} if over is None else {"over": over.digest}),
            "rows": {"train": len(encoded), "held_out": len(held_out)},
            "labels": list(corpus.labels),
            "learning_rate": settings.rate,
            "versions": library_versions(),
        }
        with _storage_errors(directory), directory.locked(record, resume=settings.resume):
            if over is not None and client is not None:
                client.pull(over.record, directory.over)
            return _Run(
                settings=settings,
                reporter=reporter,
                directory=directory,
                corpus=corpus,
                tokenizer=tokenizer,
                path=path,
                train=encoded,
                held_out=held_out,
                over=over,
                publisher=publisher,
            ).result()


@contextmanager
def _storage_errors(directory: RunDirectory) -> Iterator[None]:
    """Report a full disk or full memory in one line, with advice.

    Torch reports a failed write of a checkpoint as a RuntimeError, which only its text distinguishes from others.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device is out of memory: lower --batch-size (and raise --gradient-accumulation-steps to keep the "
            "size of a step), or lower --num-virtual-tokens"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and "PytorchStreamWriter" not in str(error)
            and "inline_container" not in str(error)
        ):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        raise TrainingError(
            f"{directory.path} cannot be written: {reason}. Free some space and run the command again; with --resume "
            "it continues from the last evaluation, if there was one"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The part of a training that needs the model.

    Attributes:
        settings: The settings of the training.
        reporter: Callbacks that report on it.
        directory: The run directory, already locked.
        corpus: The data.
        tokenizer: The model's tokenizer.
        path: Directory or hub id of the model.
        train: Encoded training rows.
        held_out: Encoded held-out rows.
        over: The adapter that the soft prompt is trained over, already in the directory; None for the bare model.
        publisher: The server to publish to, already checked; None without ``--push``.
    """

    settings: TrainSettings
    reporter: Reporter
    directory: RunDirectory
    corpus: Corpus
    tokenizer: Any
    path: str
    train: list[Encoded]
    held_out: list[Encoded]
    over: Over | None
    publisher: Publisher | None

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def result(self) -> dict[str, Any]:
        """Train unless the run is complete, then publish if a publisher is given."""
        base = self._load_base() if not self.settings.has_head or self.publisher is not None else None
        golden = (self.held_out or self.train)[: self.settings.golden_prompts]
        if self.publisher is not None:
            self.publisher.check_base(base, golden)
        result: dict[str, Any] | None = self.directory.read("result.json")
        has_bare = result is None and not self.settings.has_head
        before = {"bare": self._score(base, is_bare=True)} if has_bare else {}
        if self.over is not None:
            base = add_over(base, self.directory.over)
            if self.publisher is not None:
                self.publisher.check_over(base, golden)
            before |= {} if result is not None else {"over": self._score(base, is_bare=True)}
        if self.settings.has_head:
            base = self._load_classifier()
        if result is None:
            result = self._trained(base, before)
            self.directory.write("result.json", result)
        else:
            self.reporter.say(f"{self.directory.path} contains a completed training")
        if self.publisher is not None:
            model = load_adapter(base, self.directory.adapter)
            result["published"] = self.publisher.publish(model, golden, result)
            self.directory.write("result.json", result)
        return result

    def _trained(self, base: Any, before: dict[str, CompletionScores | None]) -> dict[str, Any]:
        settings, started = self.settings, time.monotonic()
        set_seed(settings.seed)
        init_text = initial_text(self.corpus, settings) if settings.method.starts_from_text else None
        model = make_peft_model(
            base,
            self.tokenizer,
            settings,
            text=init_text or beginning_of_data(self.corpus),
            context=_context(self.train, self.corpus),
            num_tasks=self.corpus.num_tasks,
        )
        self._check_files(model)
        scoring = time.monotonic()
        untrained = self._score(model)
        seconds_per_evaluation = time.monotonic() - scoring
        checkpoint = self.directory.newest_checkpoint() if settings.resume else None
        if checkpoint is not None:
            self.reporter.say(f"resuming from {checkpoint.name}")
        elif settings.resume:
            self.directory.truncate_records(0)
        rows = f"{len(self.train)} rows, {len(self.held_out)} held out"
        steps = num_steps(settings, len(self.train))
        done = 0 if checkpoint is None else self.directory.step_of(checkpoint)
        each = seconds_per_step(model, self.train, settings, self._pad_id)
        each += seconds_per_evaluation / steps_between_evaluations(settings, len(self.train))
        planned = steps - done + (round(SHARE * steps) * settings.search if not done else 0)
        about = timedelta(seconds=round(planned * each))
        self.reporter.say(f"{steps} steps over {rows}, on {model.device}: about {about} at most")
        make = self._maker(model, untrained)
        if settings.search:
            if untrained is None:
                raise SettingsError("search needs held-out rows, and the data has too few")
            rate = find_rate(settings, steps, self.directory, make, self.reporter.say)
            self.reporter.say(f"training at the rate {rate:g}")
            settings = replace(settings, learning_rate=rate)
        trainer = train_steadily(
            lambda halvings: make(replace(settings, learning_rate=settings.rate / 2**halvings), self.directory),
            self.directory,
            checkpoint,
            self.reporter.warn,
        )
        best = trainer.best
        if best is not None:
            restore(model, best.state)
        base_name = self._base_name()
        save_adapter(model, self.directory.adapter, base_name=base_name, keeps_text=init_text is not None)
        prompt_format = recorded_format(self.corpus.train, self.train, settings.separator).to_json()
        self.directory.write(f"{self.directory.adapter.name}/{FORMAT_FILE}", prompt_format)
        drawn = draw_curves(
            self.directory.records(), self.directory.curves, title=f"{settings.name}: {settings.method}"
        )
        if not drawn:
            self.reporter.say("no curves.png: matplotlib is not installed")
        reloaded = load_adapter(remove_adapter(model), self.directory.adapter)
        trained = self._score(reloaded)
        remove_adapter(reloaded)
        if best is not None and untrained is not None and trained is not None:
            losses = [
                (entry["step"], entry["eval_loss"]) for entry in self.directory.records() if "eval_loss" in entry
            ]
            for warning in result_warnings(
                settings.method, untrained=untrained, trained=trained, best_step=best.step, losses=losses
            ):
                self.reporter.warn(warning)
        return {
            "name": settings.name,
            "method": settings.method,
            "task_type": settings.task_type,
            "adapter": str(self.directory.adapter),
            "base_model": base_name,
            "over": None if self.over is None else self.over.ref,
            "learning_rate": trainer.settings.rate,
            "init_text": init_text,
            "search": self.directory.read(SEARCH_FILE),
            "format": prompt_format,
            "steps": trainer.state.global_step,
            "best_step": None if best is None else best.step,
            "train_loss": _last_loss(self.directory),
            "seconds": round(time.monotonic() - started, 1),
            "scores": {
                name: None if scores is None else asdict(scores)
                for name, scores in (before | {"untrained": untrained, "trained": trained}).items()
            },
        }

    def _maker(
        self, model: PeftModel, untrained: CompletionScores | None
    ) -> Callable[[TrainSettings, RunDirectory], SoftPromptTrainer]:
        """Makes trainers of the model in its present state."""
        initial = state_of(model)

        def make(settings: TrainSettings, directory: RunDirectory) -> SoftPromptTrainer:
            restore(model, initial)
            return SoftPromptTrainer(
                model,
                train=self.train,
                held_out=self.held_out,
                settings=settings,
                directory=directory,
                pad_id=self._pad_id,
                untrained=untrained,
                on_progress=self.reporter.on_progress,
            )

        return make

    def _score(self, model: Any, *, is_bare: bool = False) -> CompletionScores | None:
        if not self.held_out:
            return None
        # A bare model has no tasks, and not every model ignores an unknown argument.
        examples = [replace(example, task_id=None) for example in self.held_out] if is_bare else self.held_out
        score_all = score_classes if self.settings.has_head else score
        return score_all(model, examples, batch_size=self.settings.batch_size, pad_id=self._pad_id)

    def _check_files(self, model: PeftModel) -> None:
        """Let the server check the files of an untrained adapter: it may adapt fewer modules than PEFT does."""
        if self.publisher is not None and not self.settings.method.is_soft_prompt:
            with TemporaryDirectory() as name:
                save_adapter(model, Path(name), base_name=self._base_name(), keeps_text=False)
                self.publisher.check_files(Path(name))

    def _base_name(self) -> str:
        if self.settings.base_name is not None:
            return self.settings.base_name
        if self.publisher is not None:
            return self.publisher.base_name
        return DEMO_NAME if self.settings.model == DEMO else self.settings.model

    def _load_classifier(self) -> Any:
        device = _device(self.settings)
        set_seed(self.settings.seed)
        return load_classifier(
            self.path,
            self.settings.revision,
            labels=self.corpus.labels,
            dtype=_dtype(self.settings, device),
            pad_id=self._pad_id,
        ).to(device)

    def _load_base(self) -> Any:
        device = _device(self.settings)
        dtype = _dtype(self.settings, device)
        try:
            base: Any = AutoModelForCausalLM.from_pretrained(
                self.path, revision=self.settings.revision, dtype=dtype, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise TrainingError(f"the model {self.path!r} cannot be loaded: {error}") from error
        return base.to(device)


def _context(train: list[Encoded], corpus: Corpus) -> list[Encoded]:
    """Examples to initialise a CPT prompt from: one of each label first, then in the order of the file."""
    first: dict[str | None, int] = {}
    for place, example in enumerate(corpus.train):
        first.setdefault(getattr(example, "label", None), place)
    chosen = list(first.values())
    return [train[place] for place in [*chosen, *(place for place in range(len(train)) if place not in chosen)][:64]]


def _last_loss(directory: RunDirectory) -> float | None:
    """Mean training loss of the last twenty steps."""
    losses = [entry["loss"] for entry in directory.records() if "loss" in entry][-20:]
    return sum(losses) / len(losses) if losses else None


def _located(model: str, revision: str | None) -> str:
    try:
        return locate(model, revision)
    except ConfigurationError as error:
        raise TrainingError(error.message) from error


def _config_and_tokenizer(path: str, revision: str | None) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrainingError(f"the model {path!r} cannot be loaded: {error}") from error
    return config, tokenizer


def _max_tokens(config: Any) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(limit := getattr(text, name, None), int):
            return limit
    raise TrainingError("the model's configuration does not state its context length")


def _eos_token_ids(path: str, config: Any, revision: str | None) -> tuple[int, ...]:
    """The end-of-sequence tokens by the server's rules: the generation configuration's, else the model's."""
    try:
        ids = transformers.GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
    except OSError:
        ids = None
    ids = config.get_text_config().eos_token_id if ids is None else ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _device(settings: TrainSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda, but no CUDA device was found")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """Resolve ``auto``: float32 on a CPU, where it is exact and fastest; bfloat16 on CUDA if supported."""
    if settings.dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
