"""Writes a PEFT directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, serialize_file

from prompt_store.durable import write_file
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE
from server.client.importers.torch_files import Array


def write_peft_directory(directory: Path, config: Mapping[str, object], tensors: Mapping[str, Array]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Each tensor has the narrowest type that holds it exactly: bfloat16, float16 or float32.

    Args:
        directory: Created if it is missing.
        config: The configuration.
        tensors: float32 tensors by name.

    Raises:
        FileExistsError: If the directory holds one of the files already.
        OSError: If a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (directory / name).exists():
            raise FileExistsError(f"{directory / name} exists already: choose another directory")
    narrow = {name: _narrowed(tensor) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(dtype=dtype, shape=list(values.shape), data_ptr=values.ctypes.data, data_len=values.nbytes)
        for name, (dtype, values) in narrow.items()
    }
    # The library reads the arrays at their addresses: ``narrow`` keeps them until it returns.
    serialize_file(specs, directory / WEIGHTS_FILE, {"format": "pt"})
    # Last, so that an interrupted run leaves no directory that looks complete.
    write_file(directory / CONFIG_FILE, json.dumps(dict(config), indent=2, allow_nan=False).encode() + b"\n")


def _narrowed(tensor: Array) -> tuple[str, npt.NDArray[np.generic]]:
    """The narrowest element type that holds a tensor exactly, and its elements."""
    bits = np.ascontiguousarray(tensor, "<f4").view(np.uint32)
    if not (bits & 0xFFFF).any():
        return "bfloat16", (bits >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(tensor, "<f2")
    if np.array_equal(half.astype(np.float32), tensor):
        return "float16", half
    return "float32", np.ascontiguousarray(tensor, "<f4")
