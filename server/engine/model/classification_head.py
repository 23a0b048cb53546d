"""Classification heads: the linear layer that a soft prompt for SEQ_CLS was trained with, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import safe_open

from prompt_store.types import HEAD_TENSOR_PATTERN
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SoftPromptSource


class Computed(Protocol):
    """The part of the scheduler's ``Chunk`` that matters here."""

    @property
    def seq(self) -> Sequence | None:
        """Whose positions are computed."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many."""
        ...

    @property
    def samples(self) -> bool:
        """Whether the last of them is the sequence's last."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer in float32, on the host: heads are small, and a step reads one row by each.

    Attributes:
        weight: [labels, hidden size].
        bias: [labels], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def logits(self, hidden: torch.Tensor) -> list[float]:
        """What each label gets.

        Args:
            hidden: [hidden size], float32.
        """
        values: list[float] = torch.nn.functional.linear(hidden, self.weight, self.bias).tolist()
        return values


def read_head(path: str, *, num_labels: int, width: int) -> Head:
    """Read the head from a soft prompt's file.

    Args:
        path: A safetensors file.
        num_labels: Labels that it was recorded with.
        width: The model's hidden size.

    Raises:
        ValueError: If it is not there, or has another shape.
    """
    with safe_open(path, framework="pt") as file:
        found = {
            name.rpartition(".")[2]: file.get_tensor(name).float()
            for name in file.keys()  # noqa: SIM118 - the file is no mapping
            if HEAD_TENSOR_PATTERN.fullmatch(name)
        }
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or tuple(weight.shape) != (num_labels, width):
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(f"its weight has shape {shape}; {(num_labels, width)} is needed")
    if bias is not None and tuple(bias.shape) != (num_labels,):
        raise ValueError(f"its bias has shape {tuple(bias.shape)}; {(num_labels,)} is needed")
    return Head(weight, bias)


def wants_head(chunk: Computed) -> bool:
    """Whether the head of the chunk's soft prompt reads its last row."""
    return chunk.samples and chunk.seq is not None and chunk.seq.request.params.classify


def head_logits(
    chunks: SequenceOf[Computed], hidden: torch.Tensor, head_of: Callable[[SoftPromptSource], Head]
) -> dict[str, list[float]]:
    """What the heads give that a step's sequences asked for.

    Args:
        chunks: What was computed.
        hidden: The base model's last hidden states [1, rows, hidden size], behind its final norm.
        head_of: The loaded head of a soft prompt.

    Returns:
        Logits of the labels by request id.
    """
    result: dict[str, list[float]] = {}
    row = 0
    for chunk in chunks:
        row += chunk.num_tokens
        if wants_head(chunk) and chunk.seq is not None and chunk.seq.request.soft_prompt is not None:
            head = head_of(chunk.seq.request.soft_prompt)
            result[chunk.seq.request_id] = head.logits(hidden[0, row - 1].float().cpu())
    return result
