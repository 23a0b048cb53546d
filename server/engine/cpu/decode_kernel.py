"""Attention of single rows over paged keys and values, compiled by Numba for the host's processor.

Keys are read in place, sixteen positions at a time and all heads of a position together, so memory is read once and
in order. torch's SDPA needs them gathered first, which writes and reads them once more. Numba needs no C compiler,
and shares torch's OpenMP threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from server.engine.cpu.bf16_dot import (
    BF16_LANES,
    add_positions_bf16,
    has_bf16_dot,
    interleave_positions,
    score_positions_bf16,
)
from server.engine.cpu.compiled import (
    array_at,
    compiled,
    compiled_twice,
    element_of,
    exp,
    float32_of,
    float32_of_ordered,
    is_bfloat16,
    ordered_int,
)
from server.engine.cpu.row_kernels import rotate_row
from server.engine.cpu.vector_code import LANES, add_positions, fetch_positions, score_positions, widen_positions


class _Scratch(NamedTuple):
    """Buffers of one thread.

    Attributes:
        query: [heads * head_dim] float32, a row's scaled queries.
        widened: [LANES * head_dim] float32, one head's keys or values of sixteen positions.
        order: [LANES] int32, the slots of ``widened``: 0, 1, ...
        interleaved: [LANES * head_dim] uint16, one head's values of sixteen positions, by ``interleave_positions``.
        rounded: [LANES] uint16, the weights of these positions in bfloat16.
    """

    query: Any
    widened: Any
    order: Any
    interleaved: Any
    rounded: Any


@compiled()
def _largest(scores):  # type: ignore[no-untyped-def]
    largest = ordered_int(-np.inf)
    for index in range(scores.shape[0]):
        largest = max(largest, ordered_int(scores[index]))
    return float32_of_ordered(largest)


@compiled()
def _cap(scores, softcap):  # type: ignore[no-untyped-def]
    for index in range(scores.shape[0]):
        scores[index] = softcap * np.tanh(scores[index] / softcap)


@compiled()
def _softmax(scores, sink):  # type: ignore[no-untyped-def]
    """Softmax in place; the exponential of ``sink`` is added to the denominator."""
    largest = max(_largest(scores), sink)
    total = np.float32(0.0)
    for index in range(scores.shape[0]):
        scores[index] = exp(scores[index] - largest)
        total += scores[index]
    total += np.exp(sink - largest)
    for index in range(scores.shape[0]):
        scores[index] /= total


def _score_float32(query, row, scale, keys, values, slots, first, seen, scores, scratch):  # type: ignore[no-untyped-def]
    """Scores of one row's heads with the keys that it sees, sixteen at a time; writes up to fifteen scores too many.

    Prefetches the values of the same positions.
    """
    num_heads, num_kv_heads, head_dim = scores.shape[0], keys.shape[1], keys.shape[2]
    stride, group_size, whole = num_kv_heads * head_dim, num_heads // num_kv_heads, head_dim // LANES * LANES
    own, widened, order = scratch.query, scratch.widened, scratch.order
    for index in range(num_heads * head_dim):
        own[index] = float32_of(query[row, index]) * scale
    widens = is_bfloat16(keys) and group_size > 1  # once for all heads of a group
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(values, slots, at, stride, base, head_dim)
            if widens:
                widen_positions(keys, slots, at, stride, base, whole, widened, 0, whole)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                to = head * scores.shape[1] + column
                if widens:
                    score_positions(own, head * head_dim, widened, order, 0, whole, 0, whole, scores, to)
                else:
                    score_positions(own, head * head_dim, keys, slots, at, stride, base, whole, scores, to)
                if whole < head_dim:
                    for position in range(LANES):
                        key = keys[slots[at + position], kv_head]
                        for d in range(whole, head_dim):
                            scores[head, column + position] += own[head * head_dim + d] * float32_of(key[d])


def _mix_float32(weights, values, keys, slots, first, then, seen, mixed, scratch):  # type: ignore[no-untyped-def]
    """Add the weighted values that one row sees to ``mixed``, and prefetch the keys of the next row."""
    num_heads, num_kv_heads, head_dim = weights.shape[0], keys.shape[1], keys.shape[2]
    stride, group_size, whole = num_kv_heads * head_dim, num_heads // num_kv_heads, head_dim // LANES * LANES
    widened, order = scratch.widened, scratch.order
    widens = is_bfloat16(values) and group_size > 1
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(keys, slots, min(then + column, slots.shape[0] - LANES), stride, base, head_dim)
            if widens:
                widen_positions(values, slots, at, stride, base, whole, widened, 0, whole)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                of = head * weights.shape[1] + column
                if widens:
                    add_positions(weights, of, widened, order, 0, whole, 0, whole, mixed, head * head_dim)
                else:
                    add_positions(weights, of, values, slots, at, stride, base, whole, mixed, head * head_dim)
                if whole < head_dim:
                    for position in range(LANES):
                        value = values[slots[at + position], kv_head]
                        for d in range(whole, head_dim):
                            mixed[head, d] += weights[head, column + position] * float32_of(value[d])


_compiled_score_float32, _compiled_mix_float32 = compiled()(_score_float32), compiled()(_mix_float32)


def _score_bf16(query, row, scale, keys, values, slots, first, seen, scores, scratch):  # type: ignore[no-untyped-def]
    """``_score_float32`` for bfloat16, by VDPBF16PS."""
    num_heads, num_kv_heads, head_dim = scores.shape[0], keys.shape[1], keys.shape[2]
    if head_dim % BF16_LANES:
        _compiled_score_float32(query, row, scale, keys, values, slots, first, seen, scores, scratch)
        return
    stride, group_size = num_kv_heads * head_dim, num_heads // num_kv_heads
    query_at = row * query.shape[1]
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(values, slots, at, stride, base, head_dim)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                to = head * scores.shape[1] + column
                score_positions_bf16(
                    query, query_at + head * head_dim, scale, keys, slots, at, stride, base, head_dim, scores, to
                )


def _mix_bf16(weights, values, keys, slots, first, then, seen, mixed, scratch):  # type: ignore[no-untyped-def]
    """``_mix_float32`` for bfloat16, by VDPBF16PS; weights are rounded to bfloat16, as in torch's attention."""
    num_heads, num_kv_heads, head_dim = weights.shape[0], keys.shape[1], keys.shape[2]
    if head_dim % BF16_LANES:
        _compiled_mix_float32(weights, values, keys, slots, first, then, seen, mixed, scratch)
        return
    stride, group_size = num_kv_heads * head_dim, num_heads // num_kv_heads
    rounded, interleaved = scratch.rounded, scratch.interleaved
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(keys, slots, min(then + column, slots.shape[0] - LANES), stride, base, head_dim)
            interleave_positions(values, slots, at, stride, base, head_dim, interleaved, 0, head_dim)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                for position in range(LANES):
                    rounded[position] = element_of(weights[head, column + position], rounded)
                add_positions_bf16(rounded, 0, interleaved, head_dim, mixed, head * head_dim)


def _score(*_arguments: Any) -> Any:
    """The function for the dtype and the processor, in compiled code only."""
    raise NotImplementedError


def _mix(*_arguments: Any) -> Any:
    """The function for the dtype and the processor, in compiled code only."""
    raise NotImplementedError


@overload(_score)
def _overload_score(query, row, scale, keys, values, slots, first, seen, scores, scratch):  # type: ignore[no-untyped-def]
    return _score_bf16 if keys.dtype == types.uint16 and has_bf16_dot() else _score_float32


@overload(_mix)
def _overload_mix(weights, values, keys, slots, first, then, seen, mixed, scratch):  # type: ignore[no-untyped-def]
    return _mix_bf16 if keys.dtype == types.uint16 and has_bf16_dot() else _mix_float32


@compiled()
def _attend_share(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, rows, scale, window, softcap, sinks, out
):
    """Attention of one thread's rows."""
    num_heads, head_dim = out.shape[1], out.shape[2]
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
    scores = np.empty((num_heads, longest + LANES), np.float32)
    mixed = np.empty((num_heads, head_dim), np.float32)
    scratch = _Scratch(
        np.empty(num_heads * head_dim, np.float32),
        np.empty(LANES * head_dim, np.float32),
        np.arange(LANES).astype(np.int32),
        np.empty(LANES * head_dim, np.uint16),
        np.empty(LANES, np.uint16),
    )
    for index in range(rows.shape[0]):
        row = rows[index]
        skipped = max(0, lengths[row] - window) if window else 0
        seen = lengths[row] - skipped
        first = starts[row] + skipped
        mixed[:] = np.float32(0.0)
        _score(query, row, np.float32(scale), keys, values, slots, first, seen, scores, scratch)
        for head in range(num_heads):
            if softcap > 0.0:
                _cap(scores[head, :seen], np.float32(softcap))
            _softmax(scores[head, :seen], sinks[head] if sinks.shape[0] else np.float32(-np.inf))
            for column in range(seen, seen + LANES - 1):
                scores[head, column] = np.float32(0.0)
        following = rows[min(index + 1, rows.shape[0] - 1)]
        then = starts[following] + (max(0, lengths[following] - window) if window else 0)
        _mix(scores, values, keys, slots, first, then, seen, mixed, scratch)
        for head in range(num_heads):
            for d in range(head_dim):
                out[row, head, d] = element_of(mixed[head, d], out)


@compiled_twice
def _attend_all(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, rows, bounds, scale, window, softcap, sinks, out
):
    """Attention of rows that each see the keys of a sequence up to their own position.

    Compiled, or read from the disk cache, when it is first called with a dtype.

    Args:
        query: [rows, heads * head_dim], float32, or bfloat16 viewed as uint16.
        keys: [slots, kv_heads, head_dim], of the same dtype.
        values: [slots, kv_heads, head_dim], of the same dtype.
        slots: [positions] int32, the slots of each sequence's keys, one sequence after another. Fifteen padding slots
            follow each sequence; their keys and values are read and ignored.
        starts: [rows] int64, index in ``slots`` of the first key of the row's sequence.
        lengths: [rows] int64, keys that each row sees, its own included.
        rows: [rows] int64, in the order in which threads take them.
        bounds: [threads + 1] int64: thread t computes ``rows[bounds[t]:bounds[t + 1]]``.
        scale: Factor of the scores.
        window: Number of newest keys that a row sees; 0 for all.
        softcap: Bound of the scores; 0 for none.
        sinks: [heads] float32, a score per head without a value; [0] for none.
        out: [rows, heads, head_dim] of the query's dtype, overwritten.
    """
    for part in prange(bounds.shape[0] - 1):
        share = rows[bounds[part] : bounds[part + 1]]
        _attend_share(query, keys, values, slots, starts, lengths, share, scale, window, softcap, sinks, out)


@compiled_twice
def _rotate_and_attend_all(  # type: ignore[no-untyped-def]
    projected_at, out_at, num_rows, num_parts, cos, sin,
    new_slots, slots, starts, lengths, rows, bounds,
    keys, values, num_heads, query_weight, key_weight, eps, rounds_first, scale, window, softcap, sinks,
):  # fmt: skip
    """Rotate queries and keys, store keys and values, finite or not, then attend. Threads are woken once for all.

    Arguments that are not listed are those of ``rotate_row`` and ``attend_rows``.

    Args:
        projected_at: Address of [rows, (heads + 2 * kv_heads) * head_dim]: each row's queries, keys, values. Queries
            are rotated in place; keys are overwritten.
        out_at: Address of [rows, heads, head_dim].
        num_rows: All rows of the flat batch, including those that are not in ``rows``.
        num_parts: Threads that rotate.
        cos: [rows, head_dim] float32.
        sin: [rows, head_dim] float32.
        new_slots: [rows] int64, the slot of each row's key and value.
        num_heads: Query heads.
    """
    num_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    projected = array_at(projected_at, (num_rows, (num_heads + 2 * num_kv_heads) * head_dim), keys)
    out = array_at(out_at, (num_rows, num_heads, head_dim), keys)
    stored_keys, stored_values = keys.reshape(len(keys), -1), values.reshape(len(values), -1)
    for part in prange(num_parts):
        own = np.empty((num_heads + num_kv_heads) * head_dim, np.float32)
        for row in range(num_rows * part // num_parts, num_rows * (part + 1) // num_parts):
            rotate_row(
                projected[row], cos[row], sin[row], query_weight, key_weight, eps, rounds_first, own,
                stored_keys[new_slots[row]], stored_values[new_slots[row]],
            )  # fmt: skip
    # Rows see each other's keys, so all keys are stored first.
    for part in prange(bounds.shape[0] - 1):
        share = rows[bounds[part] : bounds[part + 1]]
        _attend_share(projected, keys, values, slots, starts, lengths, share, scale, window, softcap, sinks, out)


attend_rows, attend_rows_in_parallel = _attend_all
rotate_and_attend, rotate_and_attend_in_parallel = _rotate_and_attend_all
