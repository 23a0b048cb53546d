"""Matrix products on the CPU with weights that are laid out for them once.

torch hands a bfloat16 product to oneDNN, which lays the weights out anew at each call: for the few rows of a decode
step that takes longer than the product itself. These are the operations that torch's own compiler uses when it
freezes a model (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ROWS_HINT = 64
"""For how many rows oneDNN chooses its layout; it serves any number."""

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` in oneDNN's layout.

    Args:
        linear: What it stands for; its weight is only kept by whoever else refers to it, such as tied embeddings.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._weight = _reorder(linear.weight.detach(), ROWS_HINT)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        product: torch.Tensor = _product(rows, self._weight, self.bias, "none", [], "")
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is anything to gain: float32 products are laid out as they are."""
    has_operations = _reorder is not None and _product is not None
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and dtype is torch.bfloat16 and has_onednn and has_operations


def pack_linears(model: nn.Module) -> int:
    """Replace every plain ``nn.Linear`` of a model; returns how many.

    Classes derived from it, such as quantised ones, know better and stay as they are.
    """
    packed: dict[int, PackedLinear] = {}
    # A module may stand in two places; a list, for the walk does not like to be changed under its feet.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Linear:
            if id(module) not in packed:
                packed[id(module)] = PackedLinear(module)
            model.set_submodule(name, packed[id(module)])
    return len(packed)
