"""The forms of modules that can be fused: RMS norms, activation functions, plain linear layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Largest difference from a formula, as a fraction of the largest value, for each dtype that is fused."""

Activation = Literal["silu", "gelu_tanh"]

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class NormForm:
    """An RMS norm over the last dimension.

    Attributes:
        factors: [width] float32, the weight; for Gemma's norms 1 is added.
        eps: Added to the mean square.
        rounds_first: Whether rows are rounded to their dtype before the product with the factors, as in Llama.
    """

    factors: torch.Tensor
    eps: float
    rounds_first: bool

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The norm of rows [..., width] by torch's operations."""
        wide = rows.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.rounds_first:
            normed = normed.to(rows.dtype).float()
        return (normed * self.factors).to(rows.dtype)


def norm_form(module: Any) -> NormForm | None:
    """The form of a norm, if one of the known formulas gives the module's outputs.

    Args:
        module: Any module. It is recognised by its outputs; its class's name only says what to try.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or eps is None or [*module.state_dict()] != ["weight"]:
        return None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype not in TOLERANCE:
        return None
    if weight.is_meta or is_hooked(module):
        return None
    generator = torch.Generator().manual_seed(0)
    # Includes rows so small that eps matters.
    rows = torch.randn(4, len(weight), generator=generator) * torch.tensor([[1e-4], [1e-2], [1.0], [30.0]])
    rows = rows.to(weight.device, weight.dtype)
    with torch.inference_mode():
        factors = weight.detach().float()
        candidates = [
            NormForm(factors, eps, rounds_first=True),
            NormForm(factors, eps, rounds_first=False),
            NormForm(1.0 + factors, eps, rounds_first=False),  # Gemma
        ]
        expected = module(rows).float()
        errors = [(candidate(rows).float() - expected).abs().max().item() for candidate in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    allowed = TOLERANCE[weight.dtype] * expected.abs().max().item()
    return candidates[best] if errors[best] <= allowed else None


def activation_of(function: Callable[[torch.Tensor], torch.Tensor]) -> Activation | None:
    """Which known activation a function computes."""
    grid = torch.linspace(-12.0, 12.0, 997)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(function(grid), known(grid), rtol=1e-5, atol=1e-6):
            return name
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody changed what a call of the module does, as accelerate does to offload weights."""
    state = vars(module)
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def is_linear(module: nn.Module) -> bool:
    """Whether it is an instance of ``nn.Linear`` itself over a plain tensor.

    Some libraries quantise a layer by a subclass of it (quanto), others by a subclass of its weight's (torchao).
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def are_plain(linears: Collection[nn.Module], shared: Collection[int]) -> bool:
    """Whether these are unhooked instances of ``nn.Linear`` itself, each with its own loaded weights.

    Args:
        linears: The layers.
        shared: From ``shared_parameters``.
    """
    return all(
        isinstance(linear, nn.Linear)
        and is_linear(linear)
        and not is_hooked(linear)
        and linear.weight.dtype in TOLERANCE
        and all(not weight.is_meta and id(weight) not in shared for weight in linear.parameters())
        for linear in linears
    )


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that more than one module has, such as tied weights."""
    found: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in vars(module)["_parameters"].values():
            if parameter is not None:
                (shared if id(parameter) in found else found).add(id(parameter))
    return shared
