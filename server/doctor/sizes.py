"""Which sizes of model fit a device, and how many tokens of context they leave room for."""

from __future__ import annotations

from dataclasses import dataclass

from server.config import GPU_MEMORY_UTILIZATION
from server.doctor.machine import Device

_CPU_SHARE = 0.8
"""Share of the free host memory to count with; the rest is for activations, the API's process and others."""

_MIN_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A well-known model as an example of its size.

    Attributes:
        name: Its name.
        parameters: Number of parameters, in billions.
        num_layers: Decoder layers.
        num_kv_heads: Key/value heads per layer.
        head_dim: Width of a head.
    """

    name: str
    parameters: float
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def weight_bytes(self, element_bytes: int) -> int:
        """Bytes of the weights."""
        return int(self.parameters * 1e9) * element_bytes

    def token_bytes(self, element_bytes: int) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


SHAPES = (
    ModelShape("SmolLM2 135M", 0.135, 30, 3, 64),
    ModelShape("Qwen2.5 0.5B", 0.49, 24, 2, 64),
    ModelShape("Llama 3.2 1B", 1.24, 16, 8, 64),
    ModelShape("Llama 3.2 3B", 3.21, 28, 8, 128),
    ModelShape("Mistral 7B", 7.25, 32, 8, 128),
    ModelShape("Llama 3.1 8B", 8.03, 32, 8, 128),
    ModelShape("Qwen2.5 14B", 14.8, 48, 8, 128),
    ModelShape("Qwen2.5 32B", 32.8, 64, 8, 128),
    ModelShape("Llama 3.1 70B", 70.6, 80, 8, 128),
)
"""Sizes from the models' configurations and model cards on the Hugging Face hub."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits.

    Attributes:
        model: Its name.
        dtype: The dtype that it would be served in.
        weight_bytes: Bytes of the weights.
        tokens: Tokens of keys and values in the rest of the memory; 0 if the model does not fit.
    """

    model: str
    dtype: str
    weight_bytes: int
    tokens: int


def fits(device: Device) -> list[Fit]:
    """Estimate for each of ``SHAPES`` whether it fits, and with how many tokens of context in all."""
    is_wide = device.name == "cpu" and not device.has_bfloat16
    element_bytes = 4 if is_wide else 2
    dtype = "float32" if is_wide else "bfloat16" if device.has_bfloat16 else "float16"
    room = int(device.free_bytes * (GPU_MEMORY_UTILIZATION if device.name == "cuda" else _CPU_SHARE))
    found = []
    for shape in SHAPES:
        weights = shape.weight_bytes(element_bytes)
        tokens = max(0, room - weights) // shape.token_bytes(element_bytes)
        found.append(Fit(shape.name, dtype, weights, tokens if tokens >= _MIN_TOKENS else 0))
    return found
