"""transformers' Trainer for a soft prompt or an adapter.

Adds separate checkpoints, evaluations, early stopping, and an end of divergent trainings.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from server.training.encoding import Encoded
from server.training.errors import InstabilityError
from server.training.heads.scoring import class_loss, collate_classes, score_classes
from server.training.peft_methods import load_state, mean_norm, restore, save_state, state_of
from server.training.rates.divergence import SizeLimit
from server.training.run_directory import RunDirectory
from server.training.scoring import CompletionScores, can_limit_logits, collate, completion_loss, score
from server.training.settings import TrainSettings

EVALUATIONS = 20
"""Default number of evaluations per run."""

_TENSORBOARD_DIRECTORY = "TENSORBOARD_LOGGING_DIR"
_STATE_FILE = "soft_prompt.safetensors"
_BEST_FILE = "best.safetensors"


@dataclass(slots=True)
class TrainingProgress:
    """Progress of a training.

    Attributes:
        step: Completed optimizer steps.
        num_steps: Optimizer steps of the whole training.
        loss: Loss of the last step.
        held_out: Scores of the last evaluation; None before the first one.
    """

    step: int
    num_steps: int
    loss: float
    held_out: CompletionScores | None = None


OnProgress = Callable[[TrainingProgress], None]


@dataclass(slots=True)
class Best:
    """The best state so far.

    Attributes:
        step: Number of steps before it.
        scores: Scores on the held-out rows.
        state: The state of the encoder or the adapter.
    """

    step: int
    scores: CompletionScores
    state: dict[str, torch.Tensor] = field(repr=False)


def is_improvement(scores: CompletionScores, best: CompletionScores, monitor: str) -> bool:
    """Whether scores are better than the best; equal accuracies are compared by their loss."""
    if monitor == "accuracy" and scores.accuracy != best.accuracy:
        return scores.accuracy > best.accuracy
    return scores.loss < best.loss


class SoftPromptTrainer(Trainer):
    """Trains the soft prompt or the adapter of a PEFT model.

    Checkpoints contain the whole encoder or adapter, and the best state so far, and are written at each evaluation.

    Args:
        model: A PEFT model.
        train: Training examples.
        held_out: Held-out examples; may be empty.
        settings: The settings of the training.
        directory: The directory of the run.
        pad_id: Token id for padding; it is masked.
        untrained: Scores before the first step, the first best state.
        on_progress: Called after each step and each evaluation.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        train: Sequence[Encoded],
        held_out: Sequence[Encoded],
        settings: TrainSettings,
        directory: RunDirectory,
        pad_id: int,
        untrained: CompletionScores | None,
        on_progress: OnProgress,
    ) -> None:
        self.best: Best | None = None if untrained is None else Best(0, untrained, state_of(model))
        self.peft_model = model
        self.limit = SizeLimit(model, settings.method)
        self.fault: str | None = None
        self.held_out = held_out
        self.train_rows = train
        self.settings = settings
        self.directory = directory
        self.pad_id = pad_id
        arguments = _arguments(settings, directory, num_examples=len(train), evaluates=bool(held_out))
        with _tensorboard_in(directory.path / "tensorboard"):
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=list(train),
                eval_dataset=list(held_out) or None,
                data_collator=collator(model, settings, pad_id),
                compute_loss_func=completion_loss,
                callbacks=[_TrainingMonitor(self, on_progress)],
            )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch: of the classes if a head is trained, otherwise of the completions."""
        if not self.settings.has_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, logits = class_loss(model, inputs, num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss

    @property
    def best_step(self) -> int | None:
        """Step of the best state; 0 for the untrained one, None without held-out rows."""
        return None if self.best is None else self.best.step

    @property
    def best_loss(self) -> float | None:
        """Held-out loss of the best state; None without held-out rows."""
        return None if self.best is None else self.best.scores.loss

    def start(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the beginning.

        Raises:
            InstabilityError: If the training diverges.
        """
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out rows, and store the state if it is the best."""
        score_all = score_classes if self.settings.has_head else score
        scores = score_all(self.peft_model, self.held_out, batch_size=self.settings.batch_size, pad_id=self.pad_id)
        norm = mean_norm(self.peft_model)
        self.fault = self.limit.fault(norm)
        is_sound = math.isfinite(scores.loss) and self.fault is None
        if is_sound and (self.best is None or is_improvement(scores, self.best.scores, self.settings.monitor)):
            self.best = Best(self.state.global_step, scores, state_of(self.peft_model))
        metrics = {"eval_loss": scores.loss, "eval_accuracy": scores.accuracy, "eval_norm": norm}
        self.log(dict(metrics))  # for trackers; it adds to what it is given
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.directory.checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        save_state(state_of(self.peft_model), folder / _STATE_FILE)
        if self.best is not None:
            save_state(self.best.state, folder / _BEST_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # A checkpoint has the rate that it was trained with; this trainer's may be half of it.
        scheduler: Any = self.lr_scheduler
        optimizer: Any = self.optimizer
        state = scheduler.state_dict()
        rates = [self.settings.rate * shape(state["last_epoch"]) for shape in scheduler.lr_lambdas]
        scheduler.load_state_dict({**state, "base_lrs": [self.settings.rate] * len(rates), "_last_lr": rates})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update(initial_lr=self.settings.rate, lr=rate)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore(self.peft_model, load_state(folder / _STATE_FILE))
        step = int(folder.name.removeprefix("checkpoint-"))
        for entry in self.directory.truncate_records(step):
            if "eval_loss" in entry and self.best is not None:
                scores = CompletionScores(entry["eval_loss"], entry["eval_accuracy"])
                if is_improvement(scores, self.best.scores, self.settings.monitor):
                    self.best = Best(entry["step"], scores, {})
        if self.best is not None:
            self.best.state = load_state(folder / _BEST_FILE)


class _TrainingMonitor(TrainerCallback):
    """Writes metrics, reports progress, and stops training."""

    def __init__(self, trainer: SoftPromptTrainer, on_progress: OnProgress) -> None:
        self._trainer = trainer
        self._on_progress = on_progress
        self._held_out: CompletionScores | None = None
        self._loss = math.nan

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm") or 0.0)):
            raise InstabilityError(
                f"step {state.global_step}: the loss is {logs['loss']} and the gradient norm "
                f"{logs.get('grad_norm')} at the rate {self._trainer.settings.rate:g}. Lower --learning-rate, or "
                "train in --dtype float32."
            )
        self._loss = logs["loss"]
        entry = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if logs.get(key) is not None}
        self._trainer.directory.record({"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **entry})
        self._on_progress(TrainingProgress(state.global_step, state.max_steps, self._loss, self._held_out))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        trainer = self._trainer
        norm = metrics["eval_norm"]
        scores = {key: value for key, value in metrics.items() if key != "eval_norm"}
        trainer.directory.record({"step": state.global_step, **scores, "norm": norm})
        self._held_out = CompletionScores(metrics["eval_loss"], metrics["eval_accuracy"])
        self._on_progress(TrainingProgress(state.global_step, state.max_steps, self._loss, self._held_out))
        if not math.isfinite(metrics["eval_loss"]):
            raise InstabilityError(f"step {state.global_step}: the held-out loss is {metrics['eval_loss']}.")
        if trainer.fault is not None:
            raise InstabilityError(
                f"step {state.global_step}: {trainer.fault}: the training diverges at the rate "
                f"{trainer.settings.rate:g}."
            )
        control.should_training_stop = control.should_training_stop or self._is_out_of_patience()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.directory.keep_checkpoints(self._trainer.best_step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A resumed run that had already run out of patience must not train further.
        control.should_training_stop = self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        best, patience = self._trainer.best, self._trainer.settings.patience
        if not patience or best is None:
            return False
        at: list[int] = [entry["step"] for entry in self._trainer.directory.records() if "eval_loss" in entry]
        return sum(step > best.step for step in at) >= patience


def collator(model: PeftModel, settings: TrainSettings, pad_id: int) -> Callable[[Sequence[Encoded]], dict[str, Any]]:
    """Makes batches of examples: with classes if a head is trained, otherwise with completions."""
    if settings.has_head:
        return lambda examples: collate_classes(examples, pad_id)
    limit_logits = can_limit_logits(model)
    return lambda examples: collate(examples, pad_id, limit_logits=limit_logits)


def seconds_per_step(model: PeftModel, examples: Sequence[Encoded], settings: TrainSettings, pad_id: int) -> float:
    """Measure the time of an optimizer step by one forward and backward pass, which change nothing."""
    count = min(settings.batch_size, len(examples))
    batch = collator(model, settings, pad_id)(examples[:: len(examples) // count][:count])
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        started = time.monotonic()
        inputs: dict[str, Any] = {
            key: value if isinstance(value, int) else value.to(model.device) for key, value in batch.items()
        }
        if settings.has_head:
            loss, _ = class_loss(model, inputs)
        else:
            labels = inputs.pop("labels")
            loss = completion_loss(model(**inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds = time.monotonic() - started
    model.zero_grad()
    model.train(was_training)
    return seconds * settings.gradient_accumulation_steps


def steps_between_evaluations(settings: TrainSettings, num_examples: int) -> int:
    """Number of optimizer steps between two evaluations, and between two checkpoints."""
    return settings.eval_steps or max(1, num_steps(settings, num_examples) // EVALUATIONS)


def num_steps(settings: TrainSettings, num_examples: int) -> int:
    """Number of optimizer steps of a training."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(num_examples / settings.batch_size)
    return max(1, math.ceil(math.ceil(batches / settings.gradient_accumulation_steps) * settings.epochs))


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Let transformers' callback write there, unless the user names another directory."""
    if _TENSORBOARD_DIRECTORY in os.environ:
        yield
        return
    os.environ[_TENSORBOARD_DIRECTORY] = str(folder)
    try:
        yield
    finally:
        del os.environ[_TENSORBOARD_DIRECTORY]


class _OneDeviceArguments(TrainingArguments):
    """Arguments for at most one GPU; with several, Trainer would use DataParallel, which splits a batch."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs."""
        return min(int(super().n_gpu), 1)


def _arguments(
    settings: TrainSettings, directory: RunDirectory, *, num_examples: int, evaluates: bool
) -> TrainingArguments:
    every = steps_between_evaluations(settings, num_examples)
    return _OneDeviceArguments(
        output_dir=str(directory.checkpoints),
        seed=settings.seed,
        data_seed=settings.seed,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        use_cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        remove_unused_columns=False,
        report_to=[tracker.value for tracker in settings.report_to] or "none",
        run_name=settings.name,
        disable_tqdm=True,
    )
