"""Loss and accuracy of completions by one forward pass, and log-probabilities of texts.

Accuracy is the share of exact greedy answers, computed without generating: greedy decoding produces a completion if
each of its tokens has the largest logit after the tokens before it, and one forward pass over prompt and completion
gives all these logits. The end-of-sequence token is part of the completion.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from server.training.encoding import Encoded

IGNORED = -100


@dataclass(frozen=True, slots=True)
class CompletionScores:
    """Scores of a model on completions.

    Attributes:
        loss: Mean over all tokens of the completions, in nats.
        accuracy: Share of completions that greedy decoding would produce exactly.
    """

    loss: float
    accuracy: float


def can_limit_logits(model: Any) -> bool:
    """Whether a model can compute the logits of the last positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def collate(examples: Sequence[Encoded], pad_id: int, *, limit_logits: bool = False) -> dict[str, Any]:
    """Make a batch, padded on the right: padding between a soft prompt and its text would move the text.

    Args:
        examples: At least one.
        pad_id: Token id for padding; it is masked.
        limit_logits: Compute logits only from the start of the first completion on; with a large vocabulary logits
            need more memory than all else.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` [batch, longest], ``task_ids`` [batch] if there are tasks,
        and ``logits_to_keep`` with ``limit_logits``. Labels other than those of the completion are ``IGNORED``.
    """
    width = max(len(example.token_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example.token_ids)
        ids[row, :end] = torch.tensor(example.token_ids)
        labels[row, start:end] = torch.tensor(example.completion_ids)
        mask[row, :end] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if examples[0].task_id is not None:
        batch["task_ids"] = torch.tensor([example.task_id for example in examples])
    if limit_logits:
        first = max(1, min(len(example.prompt_ids) for example in examples))
        return {**batch, "logits_to_keep": width - first + 1}
    return batch


def completion_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens, for all methods.

    PEFT's CPT computes a different loss, which includes its context and is not divided by the number of accumulated
    batches.

    Args:
        outputs: Outputs of the model; ``logits`` may have rows for virtual tokens before those of the text.
        labels: [batch, length].
        num_items_in_batch: Labelled tokens of all accumulated batches; default: those of this batch.
    """
    logits, targets = _aligned(outputs, labels)
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


@torch.no_grad()
def score(model: Any, examples: Sequence[Encoded], *, batch_size: int, pad_id: int) -> CompletionScores:
    """Loss and accuracy of a model, with its soft prompt if it has one."""
    was_training = model.training
    model.eval()
    loss, num_tokens, num_right = 0.0, 0, 0
    limit_logits = can_limit_logits(model)
    try:
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_id, limit_logits=limit_logits)
            labels = batch.pop("labels").to(model.device)
            batch = {key: value if isinstance(value, int) else value.to(model.device) for key, value in batch.items()}
            logits, targets = _aligned(model(**batch), labels)
            counted = targets != IGNORED
            loss += float(
                functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
                )
            )
            num_tokens += int(counted.sum())
            num_right += int(((logits.argmax(-1) == targets) | ~counted).all(-1).sum())
    finally:
        model.train(was_training)
    return CompletionScores(loss / num_tokens, num_right / len(examples))


@torch.no_grad()
def text_logprobs(model: Any, example: Encoded) -> list[float]:
    """Log-probabilities of an example's tokens, except the first, at batch size 1."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([example.token_ids], device=model.device)
    tasks = {} if example.task_id is None else {"task_ids": torch.tensor([example.task_id], device=model.device)}
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **tasks).logits
    finally:
        model.train(was_training)
    logprobs = logits[0, -ids.shape[1] : -1].float().log_softmax(-1)
    return [float(value) for value in logprobs.gather(-1, ids[0, 1:, None])[:, 0]]


def _aligned(outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the labels that they predict, without the rows of virtual tokens."""
    logits = outputs.logits[:, -labels.shape[1] :]
    return logits[:, :-1], labels[:, labels.shape[1] - logits.shape[1] + 1 :]
