"""Batches, loss and accuracy of texts with a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from server.training.encoding import Encoded
from server.training.heads.classifier import class_logits
from server.training.scoring import CompletionScores, collate


def collate_classes(examples: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """Make a batch, padded on the right.

    Returns:
        ``input_ids`` and ``attention_mask`` [batch, longest], ``labels`` [batch], and ``task_ids`` [batch] if there
        are tasks.
    """
    return {**collate(examples, pad_id), "labels": torch.tensor([example.class_id for example in examples])}


def class_loss(
    model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the classes, in nats, and the logits [batch, labels].

    Args:
        model: A PEFT model with a head.
        inputs: A batch of ``collate_classes``.
        num_items_in_batch: Number of texts in all accumulated batches; default: those of this batch.
    """
    labels = inputs["labels"]
    logits = class_logits(model, {key: value for key, value in inputs.items() if key != "labels"})
    total = functional.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch), logits


@torch.no_grad()
def score_classes(model: Any, examples: Sequence[Encoded], *, batch_size: int, pad_id: int) -> CompletionScores:
    """Mean loss per text, and the share of texts whose class has the largest logit."""
    was_training = model.training
    model.eval()
    loss, num_right = 0.0, 0
    try:
        for start in range(0, len(examples), batch_size):
            batch = collate_classes(examples[start : start + batch_size], pad_id)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            mean, logits = class_loss(model, batch)
            loss += float(mean) * len(batch["labels"])
            num_right += int((logits.argmax(-1) == batch["labels"]).sum())
    finally:
        model.train(was_training)
    return CompletionScores(loss / len(examples), num_right / len(examples))
