"""transformers' Trainer for a soft prompt, with separate checkpoints, evaluations, early stopping and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from server.training.encoding import Encoded
from server.training.errors import InstabilityError
from server.training.peft_methods import load_state, mean_norm, restore, save_state, state_of
from server.training.run_directory import RunDirectory
from server.training.scoring import CompletionScores, can_limit_logits, collate, completion_loss, score
from server.training.settings import TrainSettings

EVALUATIONS = 20
"""Default number of evaluations per run."""

DIVERGENCE_FACTOR = 30.0
"""Factor over the initial mean norm, and the vocabulary's, above which a warning is given."""

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
Warn = Callable[[str], None]


@dataclass(slots=True)
class Best:
    """The best state so far.

    Attributes:
        step: Number of steps before it.
        scores: Scores on the held-out rows.
        state: The state of the encoder.
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
    """Trains the soft prompt of a PEFT model.

    Checkpoints contain the whole encoder and the best state so far, and are written at each evaluation.

    Args:
        model: A PEFT model.
        train: Training examples.
        held_out: Held-out examples; may be empty.
        settings: The settings of the training.
        directory: The directory of the run.
        pad_id: Token id for padding; it is masked.
        untrained: Scores before the first step, the first best state.
        on_progress: Called after each step and each evaluation.
        warn: Called with warnings.
        vocabulary_norm: Mean norm of the model's input embeddings; None if keys and values are trained.
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
        warn: Warn,
        vocabulary_norm: float | None,
    ) -> None:
        self.best: Best | None = None if untrained is None else Best(0, untrained, state_of(model))
        self.soft_prompt = model
        self.initial_norm = mean_norm(model)
        self.held_out = held_out
        self.settings = settings
        self.directory = directory
        self.pad_id = pad_id
        limit_logits = can_limit_logits(model)
        arguments = _arguments(settings, directory, num_examples=len(train), evaluates=bool(held_out))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=list(train),
            eval_dataset=list(held_out) or None,
            data_collator=lambda examples: collate(examples, pad_id, limit_logits=limit_logits),
            compute_loss_func=completion_loss,
            callbacks=[_TrainingMonitor(self, on_progress, warn, vocabulary_norm)],
        )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out rows, and store the state if it is the best."""
        scores = score(self.soft_prompt, self.held_out, batch_size=self.settings.batch_size, pad_id=self.pad_id)
        if self.best is None or is_improvement(scores, self.best.scores, self.settings.monitor):
            self.best = Best(self.state.global_step, scores, state_of(self.soft_prompt))
        metrics = {"eval_loss": scores.loss, "eval_accuracy": scores.accuracy}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.directory.checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        save_state(state_of(self.soft_prompt), folder / _STATE_FILE)
        if self.best is not None:
            save_state(self.best.state, folder / _BEST_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore(self.soft_prompt, load_state(folder / _STATE_FILE))
        step = int(folder.name.removeprefix("checkpoint-"))
        for entry in self.directory.truncate_records(step):
            if "eval_loss" in entry and self.best is not None:
                scores = CompletionScores(entry["eval_loss"], entry["eval_accuracy"])
                if is_improvement(scores, self.best.scores, self.settings.monitor):
                    self.best = Best(entry["step"], scores, {})
        if self.best is not None:
            self.best.state = load_state(folder / _BEST_FILE)


class _TrainingMonitor(TrainerCallback):
    """Writes metrics, reports progress, warns, and stops training."""

    def __init__(
        self, trainer: SoftPromptTrainer, on_progress: OnProgress, warn: Warn, vocabulary_norm: float | None
    ) -> None:
        self._trainer = trainer
        self._on_progress = on_progress
        self._warn = warn
        self._norm = trainer.initial_norm
        self._limit = DIVERGENCE_FACTOR * max(self._norm, vocabulary_norm or 0.0)
        self._has_warned = False
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
                f"{logs.get('grad_norm')}. Lower --learning-rate (now {self._trainer.settings.rate:g}), or train "
                "in --dtype float32. Nothing was saved after the last evaluation."
            )
        self._loss = logs["loss"]
        entry = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if logs.get(key) is not None}
        self._trainer.directory.record({"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **entry})
        self._on_progress(TrainingProgress(state.global_step, state.max_steps, self._loss, self._held_out))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        trainer = self._trainer
        norm = mean_norm(trainer.soft_prompt)
        trainer.directory.record({"step": state.global_step, **metrics, "norm": norm})
        self._held_out = CompletionScores(metrics["eval_loss"], metrics["eval_accuracy"])
        self._on_progress(TrainingProgress(state.global_step, state.max_steps, self._loss, self._held_out))
        if not math.isfinite(metrics["eval_loss"]):
            raise InstabilityError(f"step {state.global_step}: the held-out loss is {metrics['eval_loss']}")
        if norm > self._limit and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"step {state.global_step}: the soft prompt's mean norm is {norm:.3g}, up from {self._norm:.3g}: "
                "training diverges. Lower --learning-rate"
            )
        control.should_training_stop = control.should_training_stop or self._is_out_of_patience()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A resumed run that had already run out of patience must not train further.
        control.should_training_stop = self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        best, patience = self._trainer.best, self._trainer.settings.patience
        if not patience or best is None:
            return False
        at: list[int] = [entry["step"] for entry in self._trainer.directory.records() if "eval_loss" in entry]
        return sum(step > best.step for step in at) >= patience


def num_steps(settings: TrainSettings, num_examples: int) -> int:
    """Number of optimizer steps of a training."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(num_examples / settings.batch_size)
    return max(1, math.ceil(math.ceil(batches / settings.gradient_accumulation_steps) * settings.epochs))


class _OneDeviceArguments(TrainingArguments):
    """Arguments for at most one GPU; with several, Trainer would use DataParallel, which splits a batch."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs."""
        return min(int(super().n_gpu), 1)


def _arguments(
    settings: TrainSettings, directory: RunDirectory, *, num_examples: int, evaluates: bool
) -> TrainingArguments:
    steps = num_steps(settings, num_examples)
    every = settings.eval_steps or max(1, steps // EVALUATIONS)
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
        save_total_limit=2,
        use_cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
