"""Files of ``torch.save`` as NumPy arrays, without torch and without running the pickle in them.

A file is a zip archive, uncompressed, with ``NAME/data.pkl`` and one ``NAME/data/KEY`` for each storage
(https://pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from server.client.importers.kinds import ImportFileError
from server.client.importers.pickles import GlobalName, PickleRefusedError, load
from server.client.importers.zip_files import opened, read_member

Array = npt.NDArray[np.float32]

MAX_DIMENSIONS = 8

_DTYPES = {
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "<f8",
}
"""Element types by the class of the storage. bfloat16 is widened: NumPy has none."""


class _Storage:
    """One storage of a file: a flat array that tensors are views of."""

    def __init__(self, values: npt.NDArray[np.generic]) -> None:
        self.values = values


def read_torch_file(path: Path) -> object:
    """Read a file of ``torch.save``: tensors as float32 arrays, in lists, dictionaries and tuples.

    float16 and bfloat16 are widened exactly. float64 is rounded.

    Raises:
        ImportFileError: If the file is not such an archive, is damaged, or holds anything but tensors and containers.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        first_byte = file.read(1)
    if first_byte == b"\x80":
        raise ImportFileError(
            f"{path.name}: a bare pickle, as torch wrote before version 1.6. It is not opened. Load it where you "
            "trust it, and save it again with a current torch"
        )
    with opened(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ImportFileError(f"{path.name}: not a file of torch.save: it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and read_member(archive, f"{folder}byteorder") != b"little":
            raise ImportFileError(f"{path.name}: written on a big-endian machine, which is not supported")
        storages: dict[str, _Storage] = {}

        def find(persistent_id: object) -> object:
            return _storage(archive, folder, persistent_id, storages)

        try:
            return load(read_member(archive, pickles[0]), _BUILDERS, _DTYPES.keys(), find)
        except PickleRefusedError as error:
            raise ImportFileError(f"{path.name}: {error}. The file is refused") from error


def _storage(archive: zipfile.ZipFile, folder: str, persistent_id: object, storages: dict[str, _Storage]) -> _Storage:
    """The storage of a persistent id: ("storage", class, key, device, number of elements)."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) != 5 or persistent_id[0] != "storage":
        raise PickleRefusedError("the pickle refers to something that is not a storage")
    _, kind, key, _, _ = persistent_id
    if not isinstance(kind, GlobalName) or not isinstance(key, str) or not key.isalnum():
        raise PickleRefusedError("the pickle refers to a storage that is not well formed")
    if key not in storages:
        data = read_member(archive, f"{folder}data/{key}", stored=True)
        dtype = _DTYPES[kind.name]
        is_bfloat16 = dtype == "bfloat16"
        values: npt.NDArray[np.generic] = np.frombuffer(data, "<u2" if is_bfloat16 else dtype)
        values = widened(values.view(np.uint16)) if is_bfloat16 else values
        storages[key] = _Storage(values)
    return storages[key]


def widened(bits: npt.NDArray[np.uint16]) -> Array:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Array:
    """``torch._utils._rebuild_tensor_v2``: a copy of a view of a storage."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleRefusedError("the pickle holds a tensor that is not well formed")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or not all(_is_count(number) for number in numbers):
        raise PickleRefusedError("the pickle holds a tensor whose size is not well formed")
    values, start = storage.values, int(str(offset))
    last = start + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, np.float32)
    # A view with steps of 0 may be far larger than its storage.
    if last >= len(values) or math.prod(size) > len(values):
        raise PickleRefusedError("the pickle holds a tensor that is larger than its storage")
    steps = [step * values.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(values[start:], size, steps, writeable=False)
    return np.ascontiguousarray(view, np.float32).reshape(size)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**40


def _parameter(data: object, *_: object) -> Array:
    """``torch._utils._rebuild_parameter``: its tensor."""
    if not isinstance(data, np.ndarray):
        raise PickleRefusedError("the pickle holds a parameter without a tensor")
    return data


def _ordered_dict(*items: object) -> dict[object, object]:
    if items:
        raise PickleRefusedError("the pickle holds a dictionary that is not well formed")
    return {}


def _set(*items: object) -> list[object]:
    """Sets appear among the attributes of modules alone, and are not used."""
    if items not in ((), ([],)):
        raise PickleRefusedError("the pickle holds a set that is not empty")
    return []


_BUILDERS: Mapping[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
    "__builtin__.set": _set,
    "builtins.set": _set,
}
