"""Safetensors files as raw tensors, read by the library of the format: nothing is executed or unpickled.

The library checks that the header is well formed and that the tensors cover the file without gaps or overlaps
(https://github.com/huggingface/safetensors#format). A path is mapped, not read, so that a file of 1 GiB
needs no memory. The mapping is safe because no other program writes staged files and blobs, and they are never
truncated.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

from safetensors import SafetensorError, deserialize, safe_open

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.types import WEIGHTS_FILE, TensorData

MAX_HEADER_BYTES = 1024 * 1024
"""A soft prompt has a few tensors; the library alone would parse a header of 100 MB."""

_LENGTH_BYTES = 8
"""The file begins with the length of the header, a little-endian 64-bit integer."""

_ELEMENT_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_PICKLE_MAGICS = (b"PK\x03\x04", b"PK\x05\x06", b"\x80")
"""torch.save writes a zip archive of pickles; before 1.6 a bare pickle, which begins with its PROTO opcode."""

_TEXTS = {
    b"version ": "this is a Git LFS pointer; fetch the file itself by git lfs pull",
    b"<!DOCTYP": "this is a web page; download the file itself",
    b"<!doctyp": "this is a web page; download the file itself",
    b"<html": "this is a web page; download the file itself",
}
"""Other files that are often uploaded as weights, by their first bytes."""


def read_tensors(weights: bytes | Path) -> dict[str, TensorData]:
    """Read the tensors of a safetensors file, by name.

    Args:
        weights: The bytes of the file, or its path. With a path, the data are views of the mapped file.

    Raises:
        InvalidPromptError: If it is not a safetensors file, with the fault ``pickle_file``, ``header_too_large``,
            ``invalid_safetensors`` or ``unsupported_dtype``.
        OSError: If the path cannot be read.
    """
    if isinstance(weights, bytes):
        _check_first_bytes(weights[:_LENGTH_BYTES], len(weights))
        try:
            return {
                name: TensorData(tensor["dtype"], tuple(tensor["shape"]), tensor["data"])
                for name, tensor in deserialize(weights)  # type: ignore[no-untyped-call]
            }
        except SafetensorError as error:
            raise _invalid("invalid_safetensors", f"not a valid safetensors file: {error}") from error
    with weights.open("rb") as file:
        first_bytes = file.read(_LENGTH_BYTES)
        _check_first_bytes(first_bytes, weights.stat().st_size)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return _map_tensors(weights, mapped, data_start=_LENGTH_BYTES + int.from_bytes(first_bytes, "little"))


def _check_first_bytes(first_bytes: bytes, size: int) -> None:
    """Reject other file types and oversized headers before the library parses the file."""
    header_bytes = int.from_bytes(first_bytes, "little")
    # The first byte of a pickle may also begin the length of a valid header; then the size of the file decides.
    if first_bytes.startswith(_PICKLE_MAGICS) and header_bytes > max(0, size - _LENGTH_BYTES):
        raise _invalid(
            "pickle_file",
            "this is a pickle / torch.save file; only safetensors is taken: "
            "re-save with save_pretrained(..., safe_serialization=True)",
        )
    what = next((what for magic, what in _TEXTS.items() if first_bytes.startswith(magic)), None)
    if what is not None and header_bytes > max(0, size - _LENGTH_BYTES):
        raise _invalid("invalid_safetensors", f"not a safetensors file: {what}")
    if size <= _LENGTH_BYTES:
        raise _invalid("invalid_safetensors", f"not a valid safetensors file: it has only {size} bytes")
    if header_bytes > size - _LENGTH_BYTES:
        raise _invalid(
            "invalid_safetensors",
            f"not a valid safetensors file, or truncated: its header claims {header_bytes} bytes "
            f"and the whole file has {size}",
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise _invalid("header_too_large", f"its header has {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")


def _map_tensors(path: Path, mapped: memoryview, data_start: int) -> dict[str, TensorData]:
    """Views of the mapped file; the library has checked that the tensors are contiguous."""
    tensors: dict[str, TensorData] = {}
    position = data_start
    try:
        with safe_open(path, framework="np") as file:
            for name in file.offset_keys():
                view = file.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                if dtype not in _ELEMENT_BITS:
                    raise _invalid("unsupported_dtype", f"tensor {name[:100]!r} has the unknown dtype {dtype}", name)
                num_bytes = math.prod(shape) * _ELEMENT_BITS[dtype] // 8
                tensors[name] = TensorData(dtype, shape, mapped[position : position + num_bytes])
                position += num_bytes
    except SafetensorError as error:
        raise _invalid("invalid_safetensors", f"not a valid safetensors file: {error}") from error
    if position != len(mapped):
        raise _invalid("invalid_safetensors", f"its tensors end at byte {position}; the file has {len(mapped)}")
    return tensors


def _invalid(code: str, message: str, field: str | None = None) -> InvalidPromptError:
    return InvalidPromptError([Fault(code, f"{WEIGHTS_FILE}: {message}", WEIGHTS_FILE, field)])
