"""What an adapter does to the products of the base, as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from server.engine.adapters.classification_head import ClassificationHead


@dataclass(frozen=True, slots=True, eq=False)
class PartChange:
    """The change of one module of the base: of some columns of a product's output.

    The columns y, for the input x, become ``gain * y + scale * (x A^T) B^T + bias``. With an input gain, they become
    what the product gives for ``input_gain * x``.

    Attributes:
        start: First column in the product's output.
        size: Number of columns.
        a: [rank, in_features] in the serving dtype, or None. For an embedding [rank, vocabulary].
        b: [size, rank] in the serving dtype, or None. For a DoRA, its rows are multiplied by the gain.
        scale: Factor of ``x A^T``.
        gain: [size] float32, or None.
        bias: [size] float32, or None.
        input_gain: [in_features] float32, or None.
    """

    start: int
    size: int
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    input_gain: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return 0 if self.a is None else self.a.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.a, self.b, self.gain, self.bias, self.input_gain)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


Changes = Mapping[int, Sequence[PartChange]]
"""The changes of an adapter, by the index of the product."""


class AdapterWeights:
    """A loaded adapter; immutable, and compared by identity. Platforms have subclasses with their own layouts.

    Args:
        products: The products that it changes.
        nbytes: Bytes in memory, those of the head included.
        head: The classification head in its file, or None.
    """

    __slots__ = ("head", "nbytes", "products")

    def __init__(self, products: frozenset[int], nbytes: int, head: ClassificationHead | None = None) -> None:
        self.products = products
        self.nbytes = nbytes
        self.head = head


class PlainWeights(AdapterWeights):
    """An adapter as tensors, for torch's operations.

    Args:
        changes: The changes of all products.
        head: The classification head, or None.
    """

    __slots__ = ("changes",)

    def __init__(self, changes: Changes, head: ClassificationHead | None = None) -> None:
        nbytes = sum(change.nbytes for parts in changes.values() for change in parts)
        super().__init__(frozenset(changes), nbytes + (0 if head is None else head.nbytes), head)
        self.changes = changes


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    The extremes tell, since NaN spreads to both: one pass without memory of its own, a tenth of the time of
    ``isfinite().all()`` for the many small tensors of an adapter.
    """
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
