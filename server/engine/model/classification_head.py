"""Classification heads: the linear layer of a soft prompt that was trained for SEQ_CLS."""

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


@dataclass(frozen=True, slots=True)
class ClassificationHead:
    """A linear layer in float32, on the host, because heads are small and read one row per step.

    Attributes:
        weight: [labels, hidden size].
        bias: [labels], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def logits(self, hidden: torch.Tensor) -> list[float]:
        """The logits of all labels, for a hidden state [hidden size] in float32."""
        values: list[float] = torch.nn.functional.linear(hidden, self.weight, self.bias).tolist()
        return values


def read_head(path: str, *, num_labels: int, width: int) -> ClassificationHead:
    """Read the head from a soft prompt's file.

    Args:
        path: A safetensors file.
        num_labels: Recorded number of labels.
        width: The model's hidden size.

    Raises:
        ValueError: If the file has no head, or a head of another shape.
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
    return ClassificationHead(weight, bias)


def wants_head(chunk: Computed) -> bool:
    """Whether the head of the chunk's soft prompt reads the chunk's last row."""
    return chunk.samples and chunk.seq is not None and chunk.seq.request.params.classify


def head_logits(
    chunks: SequenceOf[Computed], hidden: torch.Tensor, head_of: Callable[[SoftPromptSource], ClassificationHead]
) -> dict[str, list[float]]:
    """The labels' logits of a step's classification requests.

    Args:
        chunks: The chunks of the step.
        hidden: The base model's last hidden states [1, rows, hidden size], after its final norm.
        head_of: Returns the loaded head of a soft prompt.

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
