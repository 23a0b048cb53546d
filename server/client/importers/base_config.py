"""What an importer has to know of a base model: the ``config.json`` of transformers, or of ChatGLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server.client.importers.kinds import ImportFileError
from server.client.importers.torch_files import Array

_MAX_CONFIG_BYTES = 1024 * 1024
_INTERLEAVED = frozenset({"chatglm", "glm", "glm4"})
"""Families that rotate neighbouring elements of a key; all others rotate the two halves against each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """Keys and values of a base, and its rotary embedding.

    Attributes:
        num_layers: Decoder layers.
        num_kv_heads: Key/value heads of each layer.
        head_dim: Width of a head.
        rope_theta: Base of the frequencies.
        rotary_dim: Elements of a head that are rotated; the first ones.
        is_interleaved: Whether neighbouring elements form the rotated pairs.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int
    is_interleaved: bool

    @property
    def width(self) -> int:
        """Columns of a key/value prefix."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def moved(self, keys: Array, positions: int) -> Array:
        """Keys [..., head_dim] as if they stood ``positions`` later in the text."""
        frequencies = self.rope_theta ** (-np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim)
        cos, sin = np.cos(positions * frequencies), np.sin(positions * frequencies)
        out = keys.astype(np.float64)
        rotated = out[..., : self.rotary_dim]
        if self.is_interleaved:
            first, second = rotated[..., 0::2].copy(), rotated[..., 1::2].copy()
            rotated[..., 0::2], rotated[..., 1::2] = first * cos - second * sin, second * cos + first * sin
        else:
            half = self.rotary_dim // 2
            first, second = rotated[..., :half].copy(), rotated[..., half:].copy()
            rotated[..., :half], rotated[..., half:] = first * cos - second * sin, second * cos + first * sin
        return out.astype(np.float32)


def read_base_config(path: Path) -> BaseShape:
    """Read a ``config.json``.

    Args:
        path: The file, or the directory of the model.

    Raises:
        ImportFileError: If a field is missing, or the base scales its rotary embedding.
        OSError: If the file cannot be read.
    """
    path = path / "config.json" if path.is_dir() else path
    with path.open("rb") as file:
        data = file.read(_MAX_CONFIG_BYTES + 1)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"{path.name}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or len(data) > _MAX_CONFIG_BYTES:
        raise ImportFileError(f"{path.name}: not the configuration of a model")
    try:
        return _chatglm(config, path) if config.get("model_type") == "chatglm" else _transformers(config, path)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ImportFileError(f"{path.name}: a field is missing or not valid ({error})") from error


def _chatglm(config: Mapping[str, Any], path: Path) -> BaseShape:
    if "kv_channels" not in config:
        raise ImportFileError(
            f"{path.name}: the first ChatGLM rotates by two positions, which no base of this server does"
        )
    is_grouped = bool(config.get("multi_query_attention"))
    head_dim = int(config["kv_channels"])
    return BaseShape(
        num_layers=int(config["num_layers"]),
        num_kv_heads=int(config["multi_query_group_num" if is_grouped else "num_attention_heads"]),
        head_dim=head_dim,
        rope_theta=10000.0 * float(config.get("rope_ratio", 1.0)),
        rotary_dim=head_dim // 2,
        is_interleaved=True,
    )


def _transformers(config: Mapping[str, Any], path: Path) -> BaseShape:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ImportFileError(f"{path.name}: rotary embeddings of type {str(kind)[:40]!r} are not supported here")
    num_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    share = float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    return BaseShape(
        num_layers=int(config["num_hidden_layers"]),
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rotary_dim=int(head_dim * share),
        is_interleaved=config.get("model_type") in _INTERLEAVED,
    )
