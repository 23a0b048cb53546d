"""Classification heads: the linear layer of a soft prompt or an adapter that was trained for SEQ_CLS."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from safetensors import safe_open

from prompt_store.types import HEAD_TENSOR_PATTERN


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


def read_head(
    path: str, *, num_labels: int, width: int, pattern: re.Pattern[str] = HEAD_TENSOR_PATTERN
) -> ClassificationHead:
    """Read the head from the file of a soft prompt or an adapter.

    Args:
        path: A safetensors file.
        num_labels: Recorded number of labels.
        width: The model's hidden size.
        pattern: Matches the names of its tensors.

    Raises:
        ValueError: If the file has no head, or a head of another shape.
    """
    with safe_open(path, framework="pt") as file:
        found = {
            name.rpartition(".")[2]: file.get_tensor(name).float()
            for name in file.keys()  # noqa: SIM118 - the file is no mapping
            if pattern.fullmatch(name)
        }
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or tuple(weight.shape) != (num_labels, width):
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(f"its weight has shape {shape}; {(num_labels, width)} is needed")
    if bias is not None and tuple(bias.shape) != (num_labels,):
        raise ValueError(f"its bias has shape {tuple(bias.shape)}; {(num_labels,)} is needed")
    return ClassificationHead(weight, bias)
