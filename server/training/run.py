"""One training from its files to a saved, scored and published soft prompt."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from server import demo
from server.client.http import PreludeClient
from server.errors import ConfigurationError
from server.model_source import locate
from server.training.corpus import Corpus, load_corpus, opening_of_data, opening_text
from server.training.curves import draw_curves
from server.training.encoding import Encoded, Encoder
from server.training.errors import SettingsError, TrainingError
from server.training.peft_methods import make_soft_prompt, restore, save_adapter
from server.training.publish import Publisher
from server.training.result_warnings import result_warnings
from server.training.run_directory import RunDirectory, library_versions
from server.training.scoring import Scores, score
from server.training.settings import TrainSettings
from server.training.trainer import SoftPromptTrainer, Tell, Warn

DEMO = "demo"
DEMO_DIRECTORY = Path(demo.__file__).parent / "model"
DEMO_NAME = "prelude-demo"


@dataclass(frozen=True, slots=True)
class Reporter:
    """Where a training says how it goes.

    Attributes:
        say: A line for people.
        warn: A line that should worry them.
        tell: Where training is.
    """

    say: Callable[[str], None]
    warn: Warn
    tell: Tell


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars, notes and warnings off a command's screen: none of them can be heeded there."""
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
    """Do what the settings ask for.

    What can go wrong early does: data, settings, the run directory and the server are looked at before a model loads,
    and the server's model is held against the local one before the first step.

    Args:
        settings: What to do.
        reporter: Where to say how it goes.
        api_key: The server's, where it needs one.

    Returns:
        What ``result.json`` holds.

    Raises:
        DatasetError: If the data cannot be used.
        TrainingError: If anything else is wrong.
        ClientError: If the server refuses.
    """
    settings.check()
    corpus = load_corpus(settings)
    for warning in corpus.warnings:
        reporter.warn(warning)
    path = str(DEMO_DIRECTORY) if settings.model == DEMO else _located(settings.model, settings.revision)
    config, tokenizer = _config_and_tokenizer(path, settings.revision)
    max_tokens = _max_tokens(config)
    if settings.num_virtual_tokens >= max_tokens:
        raise SettingsError(
            f"num_virtual_tokens is {settings.num_virtual_tokens}; the context has {max_tokens} positions in all"
        )
    encoder = Encoder(tokenizer, _eos_token_ids(path, config, settings.revision), settings.separator)
    limits = {"max_tokens": max_tokens, "num_virtual_tokens": settings.num_virtual_tokens}
    encoded = encoder.encode_all(settings.data, corpus.train, **limits)
    held_out = encoder.encode_all(corpus.held_out_path, corpus.held_out, **limits)
    directory = RunDirectory(settings.run_dir)
    client = PreludeClient(settings.url, api_key=api_key) if settings.push else None
    with client or nullcontext():
        publication = None
        if client is not None:
            publication = Publisher(client, settings, directory)
            publication.check_server(encoder, (corpus.held_out or corpus.train)[: settings.golden_prompts])
            if publication.max_model_len < max_tokens:
                limits["max_tokens"] = publication.max_model_len
                encoder.encode_all(settings.data, corpus.train, **limits)
                encoder.encode_all(corpus.held_out_path, corpus.held_out, **limits)
        record = {
            "settings": settings.to_json(),
            "digests": corpus.digests,
            "rows": {"train": len(encoded), "held_out": len(held_out)},
            "labels": list(corpus.labels),
            "learning_rate": settings.rate,
            "versions": library_versions(),
        }
        with _resources(directory), directory.opened(record, resume=settings.resume):
            return _Run(
                settings=settings,
                reporter=reporter,
                directory=directory,
                corpus=corpus,
                tokenizer=tokenizer,
                path=path,
                train=encoded,
                held_out=held_out,
                publication=publication,
            ).result()


@contextmanager
def _resources(directory: RunDirectory) -> Iterator[None]:
    """Tell of a full disk or memory in one line, with what to do.

    The libraries write checkpoints in their own ways, and not all of them say by its type what went wrong.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device's memory is full: lower --batch-size (with --gradient-accumulation-steps the steps stay the "
            "same), or --num-virtual-tokens"
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
            f"{directory.path} cannot be written: {reason}. Make room and start it again; --resume goes on from the "
            "last evaluation, if there was one"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The part of a training for which a model is needed.

    Attributes:
        settings: What to do.
        reporter: Where to say how it goes.
        directory: Where everything is kept; taken already.
        corpus: The data.
        tokenizer: The model's.
        path: Where the model is, or its hub id.
        train: Rows to learn from, as tokens.
        held_out: Rows to measure by, as tokens.
        publication: The server to publish to, which was looked at; None without a push.
    """

    settings: TrainSettings
    reporter: Reporter
    directory: RunDirectory
    corpus: Corpus
    tokenizer: Any
    path: str
    train: list[Encoded]
    held_out: list[Encoded]
    publication: Publisher | None

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def result(self) -> dict[str, Any]:
        """Train unless that was done before, then publish if that was asked for."""
        base = self._load_base()
        golden = (self.held_out or self.train)[: self.settings.golden_prompts]
        if self.publication is not None:
            self.publication.check_base(base, golden)
        result: dict[str, Any] | None = self.directory.read("result.json")
        if result is None:
            result = self._trained(base)
            self.directory.write("result.json", result)
        else:
            self.reporter.say(f"{self.directory.path} is trained already")
        if self.publication is not None:
            reloaded = PeftModel.from_pretrained(base, str(self.directory.adapter))
            result["published"] = self.publication.publish(reloaded, golden, result)
            self.directory.write("result.json", result)
        return result

    def _trained(self, base: Any) -> dict[str, Any]:
        settings, started = self.settings, time.monotonic()
        bare = self._score(base, is_bare=True)
        set_seed(settings.seed)
        told = opening_text(self.corpus, settings) if settings.method.starts_from_text else None
        model = make_soft_prompt(
            base,
            self.tokenizer,
            settings,
            text=told or opening_of_data(self.corpus),
            context=_context(self.train, self.corpus),
            num_tasks=self.corpus.num_tasks,
        )
        untrained = self._score(model)
        width_norm = base.get_input_embeddings().weight.detach().float().norm(dim=-1).mean()
        trainer = SoftPromptTrainer(
            model,
            train=self.train,
            held_out=self.held_out,
            settings=settings,
            directory=self.directory,
            pad_id=self._pad_id,
            untrained=untrained,
            tell=self.reporter.tell,
            warn=self.reporter.warn,
            vocabulary_norm=None if settings.method.is_key_values else float(width_norm),
        )
        checkpoint = self.directory.newest_checkpoint() if settings.resume else None
        if checkpoint is not None:
            self.reporter.say(f"going on from {checkpoint.name}")
        elif settings.resume:
            self.directory.cut_records(0)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best = trainer.best
        if best is not None:
            restore(model, best.state)
        base_name = self._base_name()
        save_adapter(model, self.directory.adapter, base_name=base_name, keeps_text=told is not None)
        draw = draw_curves(
            self.directory.records(), self.directory.curves, title=f"{settings.name}: {settings.method}"
        )
        if not draw:
            self.reporter.say("no curves.png: matplotlib is not installed")
        model.eval()
        trained = self._score(PeftModel.from_pretrained(model.get_base_model(), str(self.directory.adapter)))
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
            "adapter": str(self.directory.adapter),
            "base_model": base_name,
            "learning_rate": settings.rate,
            "init_text": told,
            "steps": trainer.state.global_step,
            "best_step": None if best is None else best.step,
            "train_loss": _last_loss(self.directory),
            "seconds": round(time.monotonic() - started, 1),
            "scores": {
                name: None if scores is None else asdict(scores)
                for name, scores in (("bare", bare), ("untrained", untrained), ("trained", trained))
            },
        }

    def _score(self, model: Any, *, is_bare: bool = False) -> Scores | None:
        if not self.held_out:
            return None
        # A bare model knows of no tasks, and not every one ignores what it does not know.
        examples = [replace(example, task_id=None) for example in self.held_out] if is_bare else self.held_out
        return score(model, examples, batch_size=self.settings.batch_size, pad_id=self._pad_id)

    def _base_name(self) -> str:
        if self.settings.base_name is not None:
            return self.settings.base_name
        if self.publication is not None:
            return self.publication.base_name
        return DEMO_NAME if self.settings.model == DEMO else self.settings.model

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
    """Examples for a CPT prompt: one of each label first, then as the file has them."""
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
    """What ends a generation by the server's rules: the generation configuration's, else the model's."""
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
    """auto: float32 on a CPU, which is exact and there the fastest that is; bfloat16 on CUDA where it has it."""
    if settings.dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
