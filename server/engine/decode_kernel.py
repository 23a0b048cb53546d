"""Attention of single rows over paged keys and values, compiled by Numba for the processor that it runs on.

Keys are read where they lie, block by block and all heads of a position together, so memory is walked once and in
order; gathering them first, as torch's SDPA needs it, would write and read them once more. Numba needs no compiler on
the machine. Its threads are OpenMP's, which torch has started already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.core import config
from numba.extending import overload

config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # torch's own pool; another would fight it for the cores

# Sums may be taken in any order, and fused; but NaN has to stay NaN, for that is how an overflow is found.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_LOG2_E = np.float32(1.44269504)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST_EXPONENT = np.float32(-87.0)
_EXPONENT_BIAS, _EXPONENT_UNIT = np.int32(127), np.int32(1 << 23)
# Cephes' expf (netlib.org/cephes): minimax polynomial of (exp(x) - 1 - x) / x**2 on [-ln 2 / 2, ln 2 / 2].
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile with Numba, and keep the result on disk for the next start where there is a place for it."""

    def decorate(function: Any) -> Any:
        try:
            return njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # neither this file's folder nor the user's cache can be written
            return njit(fastmath=_FAST, nogil=True, error_model="numpy", **options)(function)

    return decorate


def _float32(_element: Any) -> Any:
    """An element of keys or values as float32; only means something inside compiled code."""
    raise NotImplementedError


@overload(_float32, inline="always")
def _overload_float32(element):  # type: ignore[no-untyped-def]
    if element == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: element


@njit(fastmath=True)
def _largest(scores):  # type: ignore[no-untyped-def]
    largest = np.float32(-np.inf)
    for index in range(scores.shape[0]):
        # LLVM makes one instruction of this, and a chain of them of max().
        largest = scores[index] if scores[index] > largest else largest  # noqa: FURB136
    return largest


@_compiled()
def _cap(scores, softcap):  # type: ignore[no-untyped-def]
    for index in range(scores.shape[0]):
        scores[index] = softcap * np.tanh(scores[index] / softcap)


@_compiled()
def _softmax(scores, sink):  # type: ignore[no-untyped-def]
    """In place; ``sink`` takes part in the sum. exp is written out, for LLVM vectorises no call of libm's."""
    largest = max(_largest(scores), sink)
    total = np.float32(0.0)
    for index in range(scores.shape[0]):
        x = scores[index] - largest
        x = _LEAST_EXPONENT if x < _LEAST_EXPONENT else x  # noqa: FURB136 - likewise
        power = np.floor(x * _LOG2_E + np.float32(0.5))
        x = x - power * _LN_2_HIGH - power * _LN_2_LOW
        y = ((((_C0 * x + _C1) * x + _C2) * x + _C3) * x + _C4) * x + _C5
        y = y * x * x + x + np.float32(1.0)
        weight = y * np.int32((np.int32(power) + _EXPONENT_BIAS) * _EXPONENT_UNIT).view(np.float32)
        scores[index] = weight
        total += weight
    total += np.exp(sink - largest)
    for index in range(scores.shape[0]):
        scores[index] /= total


@_compiled(parallel=True)
def attend_rows(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    tables,
    block_size,
    lengths,
    rows,
    bounds,
    window,
    softcap,
    sinks,
    out,
):
    """Attention of rows that each stand at the end of their own sequence.

    Compiled for a dtype of keys when it is first called with it, or read from the disk.

    Args:
        query: [rows, heads, head_dim] float32, multiplied by the scale already.
        keys: [slots, kv_heads, head_dim], float32, or bfloat16 seen as uint16.
        values: Likewise.
        tables: [rows, blocks] int64, where each row's keys lie.
        block_size: Positions in a block.
        lengths: [rows] int64, keys that each row sees, its own included.
        rows: [rows] int64, in the order in which threads take them.
        bounds: [threads + 1] int64: thread t computes ``rows[bounds[t]:bounds[t + 1]]``.
        window: Newest keys that a row sees; 0 for all.
        softcap: float32, bound of the scores; 0 for none.
        sinks: [heads] float32, a score of each head that has no value; [0] for none.
        out: [rows, heads, head_dim] float32, which is overwritten.
    """
    num_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    group_size = query.shape[1] // num_kv_heads
    for part in prange(bounds.shape[0] - 1):
        longest = 0
        for index in range(bounds[part], bounds[part + 1]):
            longest = max(longest, lengths[rows[index]])
        scores = np.empty((num_kv_heads, group_size, longest + 2 * block_size), np.float32)
        for index in range(bounds[part], bounds[part + 1]):
            row = rows[index]
            stop = lengths[row]
            start = max(0, stop - window) if window else 0
            first_block = start // block_size
            last_block = (stop - 1) // block_size
            for block in range(first_block, last_block + 1):
                slot = tables[row, block] * block_size
                column = (block - first_block) * block_size
                for offset in range(block_size):
                    for head in range(num_kv_heads):
                        key = keys[slot + offset, head]
                        for member in range(group_size):
                            own = query[row, head * group_size + member]
                            score = np.float32(0.0)
                            for d in range(head_dim):
                                score += own[d] * _float32(key[d])
                            scores[head, member, column + offset] = score
            skipped = start - first_block * block_size
            for head in range(num_kv_heads):
                for member in range(group_size):
                    seen = scores[head, member, skipped : skipped + stop - start]
                    if softcap > 0.0:
                        _cap(seen, softcap)
                    sink = sinks[head * group_size + member] if sinks.shape[0] else np.float32(-np.inf)
                    _softmax(seen, sink)
                    mixed = out[row, head * group_size + member]
                    for d in range(head_dim):
                        mixed[d] = np.float32(0.0)
            for block in range(first_block, last_block + 1):
                base = block * block_size
                slot = tables[row, block] * block_size
                column = (block - first_block) * block_size
                offset = max(start, base) - base
                end = min(stop, base + block_size) - base
                # Four at a time: the sums are loaded and stored once for them all.
                while offset + 4 <= end:
                    for head in range(num_kv_heads):
                        value0, value1 = values[slot + offset, head], values[slot + offset + 1, head]
                        value2, value3 = values[slot + offset + 2, head], values[slot + offset + 3, head]
                        for member in range(group_size):
                            weights = scores[head, member, column + offset : column + offset + 4]
                            weight0, weight1, weight2, weight3 = weights[0], weights[1], weights[2], weights[3]
                            mixed = out[row, head * group_size + member]
                            for d in range(head_dim):
                                mixed[d] += (
                                    weight0 * _float32(value0[d])
                                    + weight1 * _float32(value1[d])
                                    + weight2 * _float32(value2[d])
                                    + weight3 * _float32(value3[d])
                                )
                    offset += 4
                while offset < end:
                    for head in range(num_kv_heads):
                        value0 = values[slot + offset, head]
                        for member in range(group_size):
                            weight0 = scores[head, member, column + offset]
                            mixed = out[row, head * group_size + member]
                            for d in range(head_dim):
                                mixed[d] += weight0 * _float32(value0[d])
                    offset += 1
