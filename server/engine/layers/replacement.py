"""Replaces modules of a model, and restores them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from server.engine.layers.stacks import Stack


class Original:
    """A replaced module without the weights of its linear layers; not a submodule of the model.

    Args:
        module: The module. Its linear layers named in ``stacks`` are released.
        stacks: For each product of the fused module, the names of the layers in it.
    """

    def __init__(self, module: Any, stacks: Mapping[str, Sequence[str]]) -> None:
        self._module = module
        self._stacks = stacks
        self._sizes = {name: [getattr(module, part).out_features for part in parts] for name, parts in stacks.items()}
        for name in itertools.chain(*stacks.values()):
            setattr(module, name, nn.Identity())

    def stack(self, name: str, attribute: str, linear: nn.Module) -> Stack:
        """A product of the fused module.

        Args:
            name: Its name in ``stacks``.
            attribute: As ``Stack.attribute``.
            linear: As ``Stack.linear``.
        """
        return Stack(attribute, linear, self._stacks[name], self._sizes[name])

    def restored(self, unstacked: Callable[[str, Sequence[int]], Sequence[nn.Linear]]) -> nn.Module:
        """The module with its linear layers.

        Args:
            unstacked: Returns the layers in a product, by its name and the output features of each layer.
        """
        for name, parts in self._stacks.items():
            for part, linear in zip(parts, unstacked(name, self._sizes[name]), strict=True):
                setattr(self._module, part, linear)
        module: nn.Module = self._module
        return module


def stacked(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer whose output is the concatenated output of several layers of the same input.

    The weight of a single layer is not copied.
    """
    if len(linears) == 1:
        return plain(linears[0].weight.detach(), linears[0].bias)
    weight = torch.cat([linear.weight for linear in linears])
    biases: list[torch.Tensor | None] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return plain(weight, None)
    nothing = [linear.weight.new_zeros(linear.out_features) for linear in linears]
    return plain(
        weight, torch.cat([zeros if bias is None else bias for bias, zeros in zip(biases, nothing, strict=True)])
    )


def unstacked(linear: nn.Linear, sizes: Sequence[int]) -> list[nn.Linear]:
    """The inverse of ``stacked``: layers whose weights are parts of the stack's, not copies.

    Args:
        linear: The stack.
        sizes: Output features of each layer.
    """
    weights = torch.split(linear.weight.detach(), list(sizes))
    bias: torch.Tensor | None = linear.bias
    biases = [None] * len(weights) if bias is None else torch.split(bias.detach(), list(sizes))
    return [plain(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A frozen layer with the given weight [out_features, in_features], which is not copied."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def replace_modules(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Replace each module for which ``make`` returns a module, and do not descend into it; returns the count.

    Shared modules stay shared. Each module is released when it is replaced, so a model is never in memory twice.
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    replaced: list[str] = []
    count = 0
    for names in places.values():
        own = [name for name in names if not name.startswith(tuple(replaced))]
        replacement = make(model.get_submodule(own[0])) if own else None
        if replacement is not None:
            count += 1
            for name in own:
                model.set_submodule(name, replacement)
                replaced.append(f"{name}.")
    return count
