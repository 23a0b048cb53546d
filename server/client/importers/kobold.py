"""KoboldAI's soft prompts: a zip archive with ``tensor.npy`` and ``meta.json``."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from server.client.importers.kinds import ImportFileError
from server.client.importers.torch_files import Array, widened
from server.client.importers.zip_files import opened, read_member

_MAX_META_BYTES = 1024 * 1024
_SHOWN_FIELDS = ("name", "author", "supported", "description")


def is_kobold(path: Path) -> bool:
    """Whether a file is such an archive."""
    if not zipfile.is_zipfile(path):
        return False
    with opened(path) as archive:
        return "tensor.npy" in archive.namelist()


def read_kobold(path: Path) -> tuple[Array, list[str]]:
    """Read the rows and what the file says about itself.

    Returns:
        The rows [virtual tokens, width], and one line for each field of ``meta.json`` that is a text.

    Raises:
        ImportFileError: If the archive is damaged, or the array is not one of float32, float16 or bfloat16.
    """
    with opened(path) as archive:
        data = io.BytesIO(read_member(archive, "tensor.npy"))
        meta = read_member(archive, "meta.json") if "meta.json" in archive.namelist() else b"{}"
    try:
        version = np.lib.format.read_magic(data)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read_header(data)
    except (ValueError, EOFError) as error:
        raise ImportFileError(f"{path.name}: tensor.npy is damaged ({error})") from error
    # KoboldAI stores bfloat16 as raw pairs of bytes.
    is_bfloat16 = dtype == np.dtype("V2")
    if not is_bfloat16 and dtype not in (np.dtype("<f4"), np.dtype("<f2")):
        raise ImportFileError(
            f"{path.name}: tensor.npy has elements of type {dtype}; float32, float16 or bfloat16 is read"
        )
    values = data.read()
    if len(shape) != 2 or len(values) != shape[0] * shape[1] * dtype.itemsize:
        raise ImportFileError(f"{path.name}: tensor.npy has shape {list(shape)} and {len(values)} bytes of data")
    flat = np.frombuffer(values, "<u2" if is_bfloat16 else dtype)
    wide = widened(flat) if is_bfloat16 else flat.astype(np.float32)
    return wide.reshape(shape, order="F" if is_fortran else "C").astype(np.float32), _notes(meta)


def _notes(meta: bytes) -> list[str]:
    try:
        fields = json.loads(meta[:_MAX_META_BYTES])
    except (ValueError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    shown = {name: fields.get(name) for name in _SHOWN_FIELDS}
    return [
        f"{name}: {ascii(value)[1:-1][:200]}" for name, value in shown.items() if isinstance(value, str) and value
    ]
