"""Check that all values of a tensor are finite, also in the serving dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from prompt_store.types import TensorData

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Stored = npt.NDArray[Any]

_CHUNK_ELEMENTS = 1 << 20
"""Values processed together: the scratch memory is a few times 8 MiB for any tensor."""

_BITS_ELEMENTS = 1 << 16
"""Values whose bits are compared together: they stay in the cache of a core."""

_SERVED_AS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_FIRST_BAD_BITS = {
    ("F32", "float32"): 0x7F800000,
    ("F32", "bfloat16"): 0x7F7F8000,
    ("F32", "float16"): 0x477FF000,  # 65520, halfway to 65536
    ("F16", "float32"): 0x7C00,
    ("F16", "bfloat16"): 0x7C00,
    ("F16", "float16"): 0x7C00,
    ("BF16", "float32"): 0x7F80,
    ("BF16", "bfloat16"): 0x7F80,
    ("BF16", "float16"): 0x4780,  # 65536
}
"""By stored and serving dtype: the magnitude, as bits, from which values are or become infinite, or are NaN."""

_BFLOAT16_OVERFLOW = np.uint32(0x7F7F8000)
"""Halfway between the largest bfloat16 and 2**128, as float32 bits: ties round to even, which is infinity."""


def is_harmless(tensor: TensorData, dtype: str) -> bool:
    """Whether all values are finite, and stay so in a serving dtype; found by one fast pass over the stored bits.

    Args:
        tensor: F32, F16 or BF16 values; others are never harmless.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
    """
    limit = _FIRST_BAD_BITS.get((tensor.dtype, dtype))
    if limit is None:
        return False
    element = np.dtype("<u4" if tensor.dtype == "F32" else "<u2")
    mask = element.type(0x7FFFFFFF if tensor.dtype == "F32" else 0x7FFF)
    data = memoryview(tensor.data)
    scratch = np.empty(_BITS_ELEMENTS, element)
    for start in range(0, len(data), _BITS_ELEMENTS * element.itemsize):
        bits = np.frombuffer(data[start : start + _BITS_ELEMENTS * element.itemsize], element)
        if int(np.bitwise_and(bits, mask, out=scratch[: len(bits)]).max(initial=0)) >= limit:
            return False
    return True


def serving_chunks(tensor: TensorData, dtype: str) -> Iterator[memoryview]:
    """The values of a tensor in a serving dtype, rounded to the nearest, as little-endian bytes in pieces.

    Args:
        tensor: F32, F16 or BF16 values.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
    """
    if _SERVED_AS[tensor.dtype] == dtype:
        yield memoryview(tensor.data)
        return
    for values in _chunks(tensor):
        singles = _to_float32(values)
        if dtype == "bfloat16":
            bits = singles.view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            yield rounded.astype("<u2").data
        elif dtype == "float16":
            with np.errstate(over="ignore"):
                yield singles.astype("<f2").data
        else:
            yield singles.astype("<f4", copy=False).data


def count_non_finite(tensor: TensorData) -> tuple[int, int]:
    """Number of values that are NaN or infinite, and the flat index of the first (-1 if there is none).

    Raises:
        KeyError: If the dtype is not F32, F16, BF16 or F64.
    """
    return _count(tensor, lambda values: ~np.isfinite(values))


def count_overflows(tensor: TensorData, dtype: str) -> tuple[int, int]:
    """Number of finite values that a serving dtype rounds to infinity, and the flat index of the first (or -1).

    F64 values are rounded to float32 first, as PEFT does when it reads them.

    Args:
        tensor: F32, F16, BF16 or F64 values.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        KeyError: If a dtype is not one of these.
    """
    is_infinite = _INFINITE[dtype]
    return _count(tensor, lambda values: np.isfinite(values) & is_infinite(_to_float32(values)))


def find_task_overflow(
    rows: TensorData, task_cols: TensorData, task_rows: TensorData, dtype: str
) -> tuple[int, int, int] | None:
    """The first value of a multitask prompt's products that is not finite in the serving dtype.

    The rows of task t are ``rows * (task_cols[t] @ task_rows[t])``, computed in float32 and then rounded.

    Args:
        rows: [virtual tokens, width] finite values.
        task_cols: [tasks, virtual tokens, ranks].
        task_rows: [tasks, ranks, width].
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Returns:
        (task, row, column), or None if all values are finite.
    """
    is_infinite = _INFINITE[dtype]
    num_tasks, num_tokens, num_ranks = task_cols.shape
    width = rows.shape[1]
    # Most prompts are far from the limit; then the products need not be computed.
    bound = num_ranks * math.prod(_largest(tensor) for tensor in (rows, task_cols, task_rows))
    if bound < _HARMLESS[dtype]:
        return None
    side = max(1, math.isqrt(_CHUNK_ELEMENTS))
    height = max(1, min(side, _CHUNK_ELEMENTS // num_ranks))
    for task in range(num_tasks):
        for column in range(0, width, height):
            columns = slice(column, min(column + height, width))
            right = _part(task_rows, (num_tasks * num_ranks, width), task * num_ranks, num_ranks, columns)
            for row in range(0, num_tokens, height):
                count = min(height, num_tokens - row)
                left = _part(
                    task_cols,
                    (num_tasks * num_tokens, num_ranks),
                    task * num_tokens + row,
                    count,
                    slice(0, num_ranks),
                )
                with np.errstate(over="ignore", invalid="ignore"):
                    product = _part(rows, (num_tokens, width), row, count, columns) * (left @ right)
                bad = ~np.isfinite(product) | is_infinite(product)
                if bad.any():
                    first_row, first_column = np.unravel_index(int(np.argmax(bad)), bad.shape)
                    return task, row + int(first_row), column + int(first_column)
    return None


def rows_of(tensor: TensorData, start: int, count: int) -> npt.NDArray[np.float32]:
    """Rows of a matrix of floats as float32, [count, width]; only these are read."""
    rows, width = tensor.shape
    return _part(tensor, (rows, width), start, count, slice(None))


def _part(
    tensor: TensorData, shape: tuple[int, int], start: int, count: int, columns: slice
) -> npt.NDArray[np.float32]:
    """Part of a tensor viewed as a matrix, as float32: some columns of ``count`` rows. Only these are read."""
    decode, element, _ = _DECODERS[tensor.dtype]
    stored = np.frombuffer(tensor.data, element).reshape(shape)[start : start + count, columns]
    return _to_float32(decode(np.ascontiguousarray(stored)))


def _largest(tensor: TensorData) -> float:
    """The largest magnitude of the values; 0 if there are none."""
    return max((float(np.max(np.abs(values))) for values in _chunks(tensor)), default=0.0)


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
    """The values in chunks: F64 as float64, all others as float32, which represents them exactly."""
    decode, element, size = _DECODERS[tensor.dtype]
    data = memoryview(tensor.data)
    for start in range(0, len(data), _CHUNK_ELEMENTS * size):
        yield decode(np.frombuffer(data[start : start + _CHUNK_ELEMENTS * size], element))


def _to_float32(values: Floats) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _decode_float(stored: Stored) -> Floats:
    return stored


def _decode_float16(stored: Stored) -> Floats:
    return stored.astype(np.float32)


def _decode_bfloat16(stored: Stored) -> Floats:
    """bfloat16 is the upper half of a float32."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _infinite_float32(values: npt.NDArray[np.float32]) -> Mask:
    return np.isinf(values)


def _infinite_float16(values: npt.NDArray[np.float32]) -> Mask:
    with np.errstate(over="ignore"):
        return np.isinf(values.astype(np.float16))


def _infinite_bfloat16(values: npt.NDArray[np.float32]) -> Mask:
    magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return (magnitudes >= _BFLOAT16_OVERFLOW) & ~np.isnan(values)


_DECODERS: dict[str, tuple[Callable[[Stored], Floats], np.dtype[Any], int]] = {
    "F32": (_decode_float, np.dtype("<f4"), 4),
    "F16": (_decode_float16, np.dtype("<f2"), 2),
    "BF16": (_decode_bfloat16, np.dtype("<u2"), 2),
    "F64": (_decode_float, np.dtype("<f8"), 8),
}
"""By dtype: from stored elements to floats, the type of a stored element, and its bytes."""

_INFINITE: dict[str, Callable[[npt.NDArray[np.float32]], Mask]] = {
    "float32": _infinite_float32,
    "float16": _infinite_float16,
    "bfloat16": _infinite_bfloat16,
}
"""By serving dtype: which float32 values it rounds to infinity."""

_HARMLESS = {"float32": 3e38, "float16": 6e4, "bfloat16": 3e38}
"""By serving dtype: a bound below which no intermediate rounding gives infinity."""
