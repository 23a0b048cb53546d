"""The shape of a model's keys and values, from its own cache, because configurations name it in many ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from server.errors import EngineStartError


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    """The shape of the keys and values, which is the same for every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def config_value(config: PreTrainedConfig, name: str) -> Any:
    """A value of a configuration; None if it is missing or differs between layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised by transformers if layers differ
        return None


def num_embeddings(embedding: torch.nn.Module, config: PreTrainedConfig) -> int:
    """Number of rows of the input embeddings.

    Raises:
        EngineStartError: If neither the module nor the configuration states it.
    """
    weight = getattr(embedding, "weight", None)
    rows = getattr(embedding, "num_embeddings", None) or (weight.shape[0] if weight is not None else None)
    rows = rows or config_value(config, "vocab_size")
    if not isinstance(rows, int):
        raise EngineStartError(f"the model's input embeddings ({type(embedding).__name__}) do not state their number")
    return rows


def key_value_shape(name: str, cache: object, num_layers: int | None) -> KeyValueShape:
    """The shape of the keys and values in a model's own cache.

    Args:
        name: The model's class, for errors.
        cache: The model's ``past_key_values`` for one text.
        num_layers: Number of layers in the configuration; None if it is missing.

    Raises:
        EngineStartError: If a layer has no keys and values, or layers have different shapes.
    """
    refused = f"{name} cannot be served"
    layers = [
        (keys, values)
        for layer in getattr(cache, "layers", ())
        if isinstance(keys := getattr(layer, "keys", None), torch.Tensor)
        and isinstance(values := getattr(layer, "values", None), torch.Tensor)
        and keys.numel()
    ]
    count = num_layers or len(getattr(cache, "layers", ())) or 0
    if not layers:
        raise EngineStartError(f"{refused}: it keeps no keys and values, which is what Prelude pages")
    if len(layers) < count:
        raise EngineStartError(
            f"{refused}: {count - len(layers)} of its {count} layers have no keys and values of their own (they do "
            "not attend, or read another layer's), and a soft prompt of keys and values has some for every layer"
        )
    shapes = {(tuple(keys.shape[1::2]), tuple(values.shape[1::2])) for keys, values in layers}
    for of_keys, of_values in shapes:
        if of_keys != of_values or len(of_keys) != 2:
            raise EngineStartError(
                f"{refused}: a layer's keys are {of_keys} and its values {of_values} (heads, width), as with latent "
                "attention; they have to be alike"
            )
    if len(shapes) > 1:
        every = ", ".join(sorted(str(of_keys) for of_keys, _ in shapes))
        raise EngineStartError(
            f"{refused}: its layers' keys and values are of several shapes (heads, width): {every}"
        )
    ((num_kv_heads, head_dim), _) = shapes.pop()
    return KeyValueShape(len(layers), num_kv_heads, head_dim)
