"""Whether every value of a tensor is finite, and still is in the dtype that it is served in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from prompt_store.types import TensorData

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_CHUNK_ELEMENTS = 1 << 20
"""Values looked at together: the scratch memory is a few times 4 MiB, whatever the tensor's size."""

_BFLOAT16_OVERFLOW = np.uint32(0x7F7F8000)
"""Halfway between bfloat16's largest value and 2**128, as float32 bits: ties go to even, which is infinity."""


def count_non_finite(tensor: TensorData) -> tuple[int, int]:
    """How many values are NaN or infinite, and the flat index of the first (-1 if there is none).

    Raises:
        KeyError: If the dtype is none of F32, F16 and BF16.
    """
    return _count(tensor, lambda values: ~np.isfinite(values))


def count_overflows(tensor: TensorData, dtype: str) -> tuple[int, int]:
    """How many finite values become infinite when rounded to a serving dtype, and the flat index of the first.

    Args:
        tensor: F32, F16 or BF16 values.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        KeyError: If either dtype is another.
    """
    return _count(tensor, _OVERFLOWS[dtype])


def _count(tensor: TensorData, is_bad: Callable[[Floats], Mask]) -> tuple[int, int]:
    total, first, position = 0, -1, 0
    for values in _chunks(tensor):
        bad = is_bad(values)
        count = int(np.count_nonzero(bad))
        if count and first < 0:
            first = position + int(np.argmax(bad))
        total += count
        position += len(values)
    return total, first


def _chunks(tensor: TensorData) -> Iterator[Floats]:
    """The values as float32, a piece at a time; exact, because float32 holds all of the three dtypes."""
    decode, size = _DECODERS[tensor.dtype]
    data = memoryview(tensor.data)
    for start in range(0, len(data), _CHUNK_ELEMENTS * size):
        yield decode(data[start : start + _CHUNK_ELEMENTS * size])


def _decode_float32(data: memoryview) -> Floats:
    return np.frombuffer(data, np.dtype("<f4"))


def _decode_float16(data: memoryview) -> Floats:
    return np.frombuffer(data, np.dtype("<f2")).astype(np.float32)


def _decode_bfloat16(data: memoryview) -> Floats:
    """bfloat16 is the upper half of a float32."""
    return (np.frombuffer(data, np.dtype("<u2")).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _never(values: Floats) -> Mask:
    return np.zeros(len(values), np.bool_)


def _overflows_float16(values: Floats) -> Mask:
    with np.errstate(over="ignore"):
        return np.isinf(values.astype(np.float16)) & np.isfinite(values)


def _overflows_bfloat16(values: Floats) -> Mask:
    magnitudes = values.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return (magnitudes >= _BFLOAT16_OVERFLOW) & np.isfinite(values)


_DECODERS: dict[str, tuple[Callable[[memoryview], Floats], int]] = {
    "F32": (_decode_float32, 4),
    "F16": (_decode_float16, 2),
    "BF16": (_decode_bfloat16, 2),
}

_OVERFLOWS: dict[str, Callable[[Floats], Mask]] = {
    "float32": _never,
    "float16": _overflows_float16,
    "bfloat16": _overflows_bfloat16,
}
