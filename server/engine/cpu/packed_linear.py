"""Linear layers on the CPU with weights packed in oneDNN's layout.

torch passes a bfloat16 product to oneDNN, which repacks the weight at each call; for the few rows of a decode step
that takes longer than the product. A float32 product goes to a BLAS that is slow for few rows. The operations here
are those of torch's compiler for frozen models (torch/_inductor/fx_passes/mkldnn_fusion.py). They are private, so
pyproject.toml bounds torch's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from server.engine.layers.forms import is_linear
from server.engine.layers.replacement import plain, replace_modules, unstacked

ROWS_HINT = 64
"""Number of rows for which oneDNN chooses the layout; any number works."""

STEP = 32
"""Elements that one instruction multiplies in bfloat16.

With AMX, if the last step of a row is not whole, oneDNN multiplies the beginning of the next row by zeros. Where that
row is not finite, this row's result is not either; so rows are padded to whole steps (seen with oneDNN 3.11).
"""

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_product: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` in oneDNN's layout.

    Args:
        linear: The layer to replace. Its weight is not kept, unless tied embeddings refer to it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        self._padding = -self.in_features % STEP if weight.dtype is torch.bfloat16 else 0
        if self._padding:
            weight = nn.functional.pad(weight, (0, self._padding))
        self._weight = _reorder(weight, ROWS_HINT)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if self._padding:
            rows = nn.functional.pad(rows, (0, self._padding))
        product: torch.Tensor = _product(rows, self._weight, self.bias, "none", [], "")
        return product

    def dense(self) -> torch.Tensor:
        """The weight [out_features, in_features], unpacked."""
        weight: torch.Tensor = self._weight.to_dense()[:, : self.in_features]
        return weight

    def unpacked(self, sizes: Sequence[int]) -> list[nn.Linear]:
        """The inverse of ``PackedLinear(stacked(linears))``: plain layers with bit-equal weights.

        Args:
            sizes: Output features of each layer.
        """
        return unstacked(plain(self.dense().contiguous(), self.bias), sizes)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed products of a dtype here; for bfloat16 that depends on the processor."""
    if dtype not in {torch.float32, torch.bfloat16} or _reorder is None or _product is None:
        return False
    try:
        PackedLinear(nn.Linear(16, 16, dtype=dtype))(torch.zeros(1, 16, dtype=dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32; emulated, it is ten times slower."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())


def pack_linears(model: nn.Module) -> int:
    """Replace every plain ``nn.Linear`` of a model; returns the count.

    Quantised layers stay.
    """

    def packed(module: nn.Module) -> PackedLinear | None:
        return PackedLinear(module) if isinstance(module, nn.Linear) and is_linear(module) else None

    return replace_modules(model, packed)
