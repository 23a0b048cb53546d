"""The operations between a layer's matrix products, each in one pass over the rows, compiled by Numba.

torch needs five to ten operations for each, and each reads and writes all rows. Sums are float32; results are rounded
to the rows' dtype where the models round them. All tensors are contiguous, in float32 or bfloat16.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from numba import prange

from server.engine.cpu.compiled import (
    KINDS,
    array_at,
    compiled,
    compiled_twice,
    element_of,
    exp,
    float32_of,
    float32_of_ordered,
    ordered_int,
)
from server.engine.cpu.vector_code import LANES, rotate_halves

logger = logging.getLogger(__name__)

SILU, GELU_TANH = 0, 1

SERIAL_ELEMENTS = 1 << 17
"""Number of elements up to which one thread is faster than several, which have to be woken."""

_PIECE = 1024  # the index of the largest element is searched in one piece of this many elements
_ONE = np.float32(1.0)
_GELU_CUBE, _GELU_SCALE = np.float32(0.044715), np.float32(0.7978845608)
_LEAST, _GREATEST = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
_INFINITY, _MINUS_INFINITY = np.int32(0x7F800000), np.int32(-0x7F800001)  # as ordered_int returns them
NO_WEIGHT = np.empty(0, np.float32)

Weights = npt.NDArray[np.float32]


def rms_norm(rows: torch.Tensor, weight: Weights, eps: float, rounds_first: bool, out: torch.Tensor) -> None:
    """RMS norm: rows divided by the root of their mean square, times a weight.

    Args:
        rows: [..., width].
        weight: [width]; for Gemma's models the caller adds 1.
        eps: Added to the mean square.
        rounds_first: Whether rows are rounded before the product with the weight, as in Llama.
        out: [..., width], overwritten.
    """
    size = rows.numel()
    kernel = _norm if size <= SERIAL_ELEMENTS else _norm_in_parallel
    kernel(rows.data_ptr(), size // weight.size, weight, eps, rounds_first, out.data_ptr(), KINDS[rows.dtype])


def add(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Add rows to ``out``; both are [..., width]."""
    size, width = rows.numel(), rows.shape[-1]
    kernel = _add if size <= SERIAL_ELEMENTS else _add_in_parallel
    kernel(rows.data_ptr(), size // width, width, out.data_ptr(), KINDS[rows.dtype])


def add_and_norm(
    rows: torch.Tensor, total: torch.Tensor, weight: Weights, eps: float, rounds_first: bool, out: torch.Tensor
) -> None:
    """Add rows [..., width] to ``total`` [..., width], and write the ``rms_norm`` of the sum to ``out``."""
    size = rows.numel()
    kernel = _add_and_norm if size <= SERIAL_ELEMENTS else _add_and_norm_in_parallel
    addresses = rows.data_ptr(), total.data_ptr(), out.data_ptr()
    kernel(*addresses, size // weight.size, weight, eps, rounds_first, KINDS[rows.dtype])


def gate(gates_and_ups: torch.Tensor, activation: int, out: torch.Tensor) -> None:
    """The gated activation of an MLP: ``activation(gate) * up``.

    Args:
        gates_and_ups: [..., 2 * width]: a row's gates, then its ups.
        activation: ``SILU`` or ``GELU_TANH``.
        out: [..., width], overwritten.
    """
    size, width = out.numel(), out.shape[-1]
    kernel = _gate if size <= SERIAL_ELEMENTS else _gate_in_parallel
    kernel(gates_and_ups.data_ptr(), size // width, width, activation, out.data_ptr(), KINDS[out.dtype])


def largest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A faster ``torch.max(rows, dim=-1)``.

    Args:
        rows: [rows, width].

    Returns:
        Each row's largest element (float32; NaN if the row has one) and its first index: [rows] each.
    """
    num_rows, width = rows.shape
    values, indices = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.long)
    kernel = _largest if rows.numel() <= SERIAL_ELEMENTS else _largest_in_parallel
    kernel(rows.data_ptr(), num_rows, width, values.numpy(), indices.numpy(), KINDS[rows.dtype])
    return values, indices


@cache
def can_compile(dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled for this dtype here; compiles them."""
    if dtype not in KINDS:
        return False
    try:
        compile_for(dtype)
    except Exception:  # of any kind, from Numba or LLVM: torch's operations are the fallback
        logger.warning("the kernels cannot be compiled for this processor; using torch's operations", exc_info=True)
        return False
    return True


def compile_for(dtype: torch.dtype) -> None:
    """Compile all kernels for one dtype, or read them from the disk cache.

    Raises:
        Exception: Of any kind, if Numba or LLVM fail.
    """
    for num_rows in (1, SERIAL_ELEMENTS + 1):
        rows, weight = torch.zeros(num_rows, 2, dtype=dtype), np.ones(2, np.float32)
        rms_norm(rows, weight, 1e-6, True, torch.empty_like(rows))
        add_and_norm(rows, rows.clone(), weight, 1e-6, True, torch.empty_like(rows))
        add(rows, rows.clone())
        gate(rows, SILU, rows.new_empty(num_rows, 1))
        largest(rows)


@compiled()
def _norm_row(row, weight, eps, rounds_first, out):  # type: ignore[no-untyped-def]
    """``out`` may be the row itself."""
    total = np.float32(0.0)
    for index in range(row.shape[0]):
        total += float32_of(row[index]) * float32_of(row[index])
    factor = _ONE / np.sqrt(total / np.float32(row.shape[0]) + np.float32(eps))
    if rounds_first:
        for index in range(row.shape[0]):
            rounded = element_of(float32_of(row[index]) * factor, out)
            out[index] = element_of(float32_of(rounded) * weight[index], out)
    else:
        for index in range(row.shape[0]):
            out[index] = element_of(float32_of(row[index]) * factor * weight[index], out)


@compiled_twice
def _norms(rows_at, num_rows, weight, eps, rounds_first, out_at, kind):  # type: ignore[no-untyped-def]
    rows = array_at(rows_at, (num_rows, weight.shape[0]), kind)
    out = array_at(out_at, rows.shape, kind)
    for row in prange(num_rows):
        _norm_row(rows[row], weight, eps, rounds_first, out[row])


@compiled()
def _add_row(row, out):  # type: ignore[no-untyped-def]
    for index in range(row.shape[0]):
        out[index] = element_of(float32_of(row[index]) + float32_of(out[index]), out)


@compiled_twice
def _adds(rows_at, num_rows, width, out_at, kind):  # type: ignore[no-untyped-def]
    rows, out = array_at(rows_at, (num_rows, width), kind), array_at(out_at, (num_rows, width), kind)
    for row in prange(num_rows):
        _add_row(rows[row], out[row])


@compiled_twice
def _adds_and_norms(  # type: ignore[no-untyped-def]
    rows_at, total_at, out_at, num_rows, weight, eps, rounds_first, kind
):
    shape = (num_rows, weight.shape[0])
    rows, total, out = array_at(rows_at, shape, kind), array_at(total_at, shape, kind), array_at(out_at, shape, kind)
    for row in prange(num_rows):
        _add_row(rows[row], total[row])
        _norm_row(total[row], weight, eps, rounds_first, out[row])


@compiled()
def _gate_row(row, activation, out):  # type: ignore[no-untyped-def]
    width = out.shape[0]
    gates, ups = row[:width], row[width:]
    if activation == SILU:
        for index in range(width):
            x = float32_of(gates[index])
            activated = element_of(x / (_ONE + exp(-x)), out)
            out[index] = element_of(float32_of(activated) * float32_of(ups[index]), out)
    else:
        for index in range(width):
            x = float32_of(gates[index])
            y = _GELU_SCALE * (x + _GELU_CUBE * x * x * x)
            # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y)).
            activated = element_of(x / (_ONE + exp(-y - y)), out)
            out[index] = element_of(float32_of(activated) * float32_of(ups[index]), out)


@compiled_twice
def _gates(gates_and_ups_at, num_rows, width, activation, out_at, kind):  # type: ignore[no-untyped-def]
    gates_and_ups = array_at(gates_and_ups_at, (num_rows, 2 * width), kind)
    out = array_at(out_at, (num_rows, width), kind)
    for row in prange(num_rows):
        _gate_row(gates_and_ups[row], activation, out[row])


@compiled()
def _largest_of(row):  # type: ignore[no-untyped-def]
    """The largest element and its first index; (NaN, 0) if there is a NaN."""
    best, least, near = _LEAST, _GREATEST, 0
    for start in range(0, row.shape[0], _PIECE):
        piece = row[start : start + _PIECE]
        most = _LEAST
        for index in range(piece.shape[0]):
            x = ordered_int(float32_of(piece[index]))
            most, least = max(most, x), min(least, x)
        if most > best:
            best, near = most, start
    if best > _INFINITY or least < _MINUS_INFINITY:
        return np.float32(np.nan), 0
    largest = float32_of_ordered(best)
    if largest == np.float32(0.0):
        near = 0  # an earlier -0.0 is equal
    while float32_of(row[near]) != largest and near < row.shape[0] - 1:
        near += 1
    return largest, near


@compiled_twice
def _largests(rows_at, num_rows, width, values, indices, kind):  # type: ignore[no-untyped-def]
    rows = array_at(rows_at, (num_rows, width), kind)
    for row in prange(num_rows):
        values[row], indices[row] = _largest_of(rows[row])


_norm, _norm_in_parallel = _norms
_add, _add_in_parallel = _adds
_add_and_norm, _add_and_norm_in_parallel = _adds_and_norms
_gate, _gate_in_parallel = _gates
_largest, _largest_in_parallel = _largests


@compiled()
def rotate_row(  # type: ignore[no-untyped-def]
    projected, cos, sin, query_weight, key_weight, eps, rounds_first, own, key, value
):
    """Apply rotary positions to one row's queries, in place, and to its key; store key and value.

    Args:
        projected: [(heads + 2 * kv_heads) * head_dim]: the row's queries, keys, values. Queries are rotated in place;
            keys are overwritten.
        cos: [head_dim] float32.
        sin: [head_dim] float32.
        query_weight: [head_dim], the weight of the ``rms_norm`` of each query head before the rotation; [0] for none.
        key_weight: [head_dim], the same for key heads; [0] for none.
        eps: Added to the mean square.
        rounds_first: Whether the norm rounds before it multiplies by the weight (see ``rms_norm``).
        own: [(heads + kv_heads) * head_dim] float32, a buffer.
        key: [kv_heads * head_dim], overwritten.
        value: [kv_heads * head_dim], overwritten.
    """
    width, num_keys = cos.shape[0], key.shape[0]
    num_rotated = projected.shape[0] - num_keys
    num_queries = num_rotated - num_keys
    half, whole = width // 2, width // 2 // LANES * LANES
    for at in range(0, num_rotated, width):
        weight = query_weight if at < num_queries else key_weight
        if weight.shape[0]:
            head = projected[at : at + width]
            _norm_row(head, weight, eps, rounds_first, head)
    for index in range(num_rotated):
        own[index] = float32_of(projected[index])
    for at in range(0, num_rotated, width):
        rotate_halves(own, at, half, whole, cos, sin)
        for low in range(whole, half):
            x, y = own[at + low], own[at + half + low]
            own[at + low] = x * cos[low] - y * sin[low]
            own[at + half + low] = y * cos[half + low] + x * sin[half + low]
    for index in range(num_queries):
        projected[index] = element_of(own[index], projected)
    for index in range(num_keys):
        key[index] = element_of(own[num_queries + index], key)
        value[index] = projected[num_rotated + index]
