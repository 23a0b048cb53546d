"""The products and embeddings of a served model, by the names that its modules have in transformers.

Fused layers compute several modules by one product, so a module of the base is a part of a product: some of its
columns. In a step with adapters, the functions of the products are exchanged for others; in all other steps they are
what they were, so adapters cost such steps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prompt_store.types import ModuleShape
from server.engine.layers.stacks import HasStacks

Rows = Callable[[torch.Tensor], torch.Tensor]
"""The function of a product: [..., in_features] to [..., out_features], or token ids to embeddings."""

_ROWS_AT_ONCE = 256
"""Rows of the unit matrix that are multiplied at once to find a weight."""


class Part(NamedTuple):
    """A module of the base in a product.

    Attributes:
        name: The module's name in transformers.
        start: First column of the product's output.
        size: Number of columns.
    """

    name: str
    start: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product, or the input embeddings.

    Attributes:
        index: Its number.
        parts: The modules of the base in it, by column.
        kind: As ``ModuleShape.kind``.
        in_features: Width of the input; the vocabulary's size for embeddings.
        out_features: Width of the output.
        is_head: Whether it reads only the rows whose logits are kept.
        scale: Factor of the output of embeddings (Gemma).
        module: The module with the weight.
        original: The function of a step without adapters.
        holder: The attributes of the object that calls the function.
        attribute: The function's name in it.
        is_own: Whether the object has the function as an attribute of its own; else it is a method of its class.
    """

    index: int
    parts: tuple[Part, ...]
    kind: str
    in_features: int
    out_features: int
    is_head: bool
    scale: float
    module: nn.Module
    original: Rows
    holder: dict[str, Any] = field(repr=False)
    attribute: str
    is_own: bool

    @property
    def device(self) -> torch.device:
        """Where its rows are. Quantised layers may have buffers only."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] of a product; a copy if it is packed or quantised.

        Args:
            dtype: The dtype of the rows that it takes.
        """
        dense = getattr(self.module, "dense", None)
        if dense is not None:
            packed: torch.Tensor = dense()
            return packed
        weight = getattr(self.module, "weight", None)
        if type(weight) is nn.Parameter and weight.is_floating_point():  # a quantised one may be of a subclass
            if isinstance(self.module, Conv1D):
                weight = weight.t()
            if tuple(weight.shape) == (self.out_features, self.in_features):
                return weight.detach()
        unit = torch.eye(self.in_features, dtype=dtype, device=self.device)
        rows = [
            self.original(unit[first : first + _ROWS_AT_ONCE]) for first in range(0, self.in_features, _ROWS_AT_ONCE)
        ]
        bias = self.bias()
        columns = torch.cat(rows) if bias is None else torch.cat(rows) - bias
        return columns.t()

    def bias(self) -> torch.Tensor | None:
        """The bias [out_features], or None."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, torch.Tensor) else None

    def exchange(self, function: Rows) -> None:
        """Let the model call another function."""
        self.holder[self.attribute] = function

    def restore(self) -> None:
        """Undo ``exchange``."""
        if self.is_own:
            self.holder[self.attribute] = self.original
        else:
            self.holder.pop(self.attribute, None)


def parts_of(names: Sequence[str], sizes: Sequence[int]) -> tuple[Part, ...]:
    """Modules that stand one behind the other in a product.

    Args:
        names: Their names.
        sizes: The number of columns of each.
    """
    ends = accumulate(sizes)
    return tuple(Part(name, end - size, size) for name, end, size in zip(names, ends, sizes, strict=True))


def find_products(model: PreTrainedModel, modules: Mapping[str, ModuleShape]) -> list[Product]:
    """The products of a model as it is served.

    Args:
        model: The model; its layers may be fused.
        modules: The modules that can be adapted, as the unfused model has them.
    """
    found: list[Product] = []
    base_prefix = f"{model.base_model_prefix}."

    def add(names: Sequence[str], sizes: Sequence[int], module: nn.Module, holder: Any, attribute: str) -> None:
        if not all(name in modules and modules[name].unsupported is None for name in names):
            return
        shape = modules[names[0]]
        scale = getattr(module, "embed_scale", 1.0) if shape.kind == "embedding" else 1.0
        found.append(
            Product(
                index=len(found),
                parts=parts_of(names, sizes),
                kind=shape.kind,
                in_features=shape.in_features,
                out_features=sum(sizes),
                is_head=not names[0].startswith(base_prefix),
                scale=float(scale),
                module=module,
                original=getattr(holder, attribute),
                holder=vars(holder),
                attribute=attribute,
                is_own=attribute in vars(holder),
            )
        )

    fused: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(fused)):
            continue
        if isinstance(module, HasStacks):
            fused.append(f"{name}.")
            for stack in module.stacks():
                names = [f"{name}.{part}" for part in stack.names]
                add(names, stack.sizes, stack.linear, module, stack.attribute)
        elif name in modules:
            add([name], [modules[name].out_features], module, module, "forward")
    return found
