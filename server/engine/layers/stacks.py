"""The products of fused modules: which layers of the base each holds, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True, slots=True)
class Stack:
    """A product of a fused module.

    Attributes:
        attribute: The fused module's attribute that holds the function of the product: rows to rows.
        linear: The linear layer of the product.
        names: Names of the replaced layers in the replaced module.
        sizes: Output features of each layer; its columns follow those of the layer before.
    """

    attribute: str
    linear: nn.Module
    names: Sequence[str]
    sizes: Sequence[int]


@runtime_checkable
class HasStacks(Protocol):
    """A fused module whose products can be replaced for a step."""

    def stacks(self) -> Sequence[Stack]:
        """Its products."""
        ...
