"""What a model's keys and values look like: seen in what it computes, because configurations name it in many ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from server.errors import EngineStartError


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    """The same for every layer, or the model is refused.

    Attributes:
        num_layers: Layers with keys and values.
        num_kv_heads: Heads of each.
        head_dim: Width of a head.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int


def config_value(config: PreTrainedConfig, name: str) -> Any:
    """A configuration's own value; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' way to say that layers differ in it
        return None


def num_embeddings(embedding: torch.nn.Module, config: PreTrainedConfig) -> int:
    """Token ids that the input embeddings have a row for.

    Raises:
        EngineStartError: If neither they nor the configuration say.
    """
    weight = getattr(embedding, "weight", None)
    rows = getattr(embedding, "num_embeddings", None) or (weight.shape[0] if weight is not None else None)
    rows = rows or config_value(config, "vocab_size")
    if not isinstance(rows, int):
        raise EngineStartError(f"the model's input embeddings ({type(embedding).__name__}) do not state their number")
    return rows


def key_value_shape(name: str, cache: object, num_layers: int | None) -> KeyValueShape:
    """The shape of what a model has put into its own cache.

    Args:
        name: The model's class, for errors.
        cache: What it returned as ``past_key_values`` for one text.
        num_layers: Its layers by the configuration; None where that does not say.

    Raises:
        EngineStartError: If not every layer has keys and values of one shape.
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
