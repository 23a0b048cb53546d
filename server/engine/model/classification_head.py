"""The labels' logits of a step, by the classification heads of its sequences."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from server.engine.adapters.classification_head import ClassificationHead
from server.engine.scheduling.sequence import Sequence
from server.engine.types import GenerateRequest


class Computed(Protocol):
    """The used attributes of the scheduler's ``Chunk``."""

    @property
    def seq(self) -> Sequence | None:
        """The sequence of the chunk."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number of positions."""
        ...

    @property
    def samples(self) -> bool:
        """Whether the chunk contains the sequence's last position."""
        ...


def wants_head(chunk: Computed) -> bool:
    """Whether a classification head reads the chunk's last row."""
    return chunk.samples and chunk.seq is not None and chunk.seq.request.params.classify


def head_logits(
    chunks: SequenceOf[Computed], hidden: torch.Tensor, head_of: Callable[[GenerateRequest], ClassificationHead]
) -> dict[str, list[float]]:
    """The labels' logits of a step's classification requests.

    Args:
        chunks: The chunks of the step.
        hidden: The base model's last hidden states [1, rows, hidden size], after its final norm.
        head_of: Returns the loaded head that a request names.

    Returns:
        Logits of the labels by request id.
    """
    result: dict[str, list[float]] = {}
    row = 0
    for chunk in chunks:
        row += chunk.num_tokens
        if wants_head(chunk) and chunk.seq is not None:
            head = head_of(chunk.seq.request)
            result[chunk.seq.request_id] = head.logits(hidden[0, row - 1].float().cpu())
    return result
