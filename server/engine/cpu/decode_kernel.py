"""Attention of single rows over paged keys and values, compiled by Numba for the processor that it runs on.

Keys are read where they lie, sixteen positions at a time and all heads of a position together, so memory is walked
once and in order; gathering them first, as torch's SDPA needs it, would write and read them once more. Numba needs no
compiler on the machine. Its threads are OpenMP's, which torch has started already.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from server.engine.cpu.compiled import (
    array_at,
    compiled,
    compiled_twice,
    element_of,
    exp,
    float32_in_order,
    float32_of,
    in_order,
)
from server.engine.cpu.pair_code import PAIRED, add_pairs, has_pairs, pair_positions, score_pairs
from server.engine.cpu.row_kernels import rotate_row
from server.engine.cpu.vector_code import LANES, add_positions, fetch_positions, score_positions, widen_positions


class _Room(NamedTuple):
    """What one thread writes to while it attends.

    Attributes:
        own: [heads * head_dim] float32, a row's queries.
        wide: [LANES * head_dim] float32, one head's keys or values of sixteen positions.
        order: [LANES] int32, where these are: one after another.
        pairs: [LANES * head_dim] uint16, one head's values of sixteen positions in pairs.
        rounded: [LANES] uint16, their weights.
    """

    own: Any
    wide: Any
    order: Any
    pairs: Any
    rounded: Any


def _has_to_widen(_array: Any) -> Any:
    """Whether the elements are narrower than what sums are taken in; only means something in compiled code."""
    raise NotImplementedError


@overload(_has_to_widen, inline="always")
def _overload_has_to_widen(array):  # type: ignore[no-untyped-def]
    narrow = array.dtype == types.uint16
    return lambda array: narrow


@compiled()
def _largest(scores):  # type: ignore[no-untyped-def]
    largest = in_order(-np.inf)
    for index in range(scores.shape[0]):
        largest = max(largest, in_order(scores[index]))
    return float32_in_order(largest)


@compiled()
def _cap(scores, softcap):  # type: ignore[no-untyped-def]
    for index in range(scores.shape[0]):
        scores[index] = softcap * np.tanh(scores[index] / softcap)


@compiled()
def _softmax(scores, sink):  # type: ignore[no-untyped-def]
    """In place; ``sink`` takes part in the sum."""
    largest = max(_largest(scores), sink)
    total = np.float32(0.0)
    for index in range(scores.shape[0]):
        scores[index] = exp(scores[index] - largest)
        total += scores[index]
    total += np.exp(sink - largest)
    for index in range(scores.shape[0]):
        scores[index] /= total


def _score_wide(query, row, scale, keys, values, slots, first, seen, scores, room):  # type: ignore[no-untyped-def]
    """Scores of one row's heads and the keys that it sees, sixteen at a time: up to fifteen more are written."""
    num_heads, num_kv_heads, head_dim = scores.shape[0], keys.shape[1], keys.shape[2]
    stride, group_size, whole = num_kv_heads * head_dim, num_heads // num_kv_heads, head_dim // LANES * LANES
    own, wide, order = room.own, room.wide, room.order
    for index in range(num_heads * head_dim):
        own[index] = float32_of(query[row, index]) * scale
    shares = _has_to_widen(keys) and group_size > 1
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(values, slots, at, stride, base, head_dim)
            if shares:
                widen_positions(keys, slots, at, stride, base, whole, wide)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                to = head * scores.shape[1] + column
                if shares:
                    score_positions(own, head * head_dim, wide, order, 0, whole, 0, whole, scores, to)
                else:
                    score_positions(own, head * head_dim, keys, slots, at, stride, base, whole, scores, to)
                if whole < head_dim:
                    for position in range(LANES):
                        key = keys[slots[at + position], kv_head]
                        for d in range(whole, head_dim):
                            scores[head, column + position] += own[head * head_dim + d] * float32_of(key[d])


def _mix_wide(weights, values, keys, slots, first, then, seen, mixed, room):  # type: ignore[no-untyped-def]
    """Add up the values that one row sees; the keys that the next one sees are on their way meanwhile."""
    num_heads, num_kv_heads, head_dim = weights.shape[0], keys.shape[1], keys.shape[2]
    stride, group_size, whole = num_kv_heads * head_dim, num_heads // num_kv_heads, head_dim // LANES * LANES
    wide, order = room.wide, room.order
    shares = _has_to_widen(values) and group_size > 1
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(keys, slots, min(then + column, slots.shape[0] - LANES), stride, base, head_dim)
            if shares:
                widen_positions(values, slots, at, stride, base, whole, wide)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                of = head * weights.shape[1] + column
                if shares:
                    add_positions(weights, of, wide, order, 0, whole, 0, whole, mixed, head * head_dim)
                else:
                    add_positions(weights, of, values, slots, at, stride, base, whole, mixed, head * head_dim)
                if whole < head_dim:
                    for position in range(LANES):
                        value = values[slots[at + position], kv_head]
                        for d in range(whole, head_dim):
                            mixed[head, d] += weights[head, column + position] * float32_of(value[d])


_compiled_score_wide, _compiled_mix_wide = compiled()(_score_wide), compiled()(_mix_wide)


def _score_in_pairs(query, row, scale, keys, values, slots, first, seen, scores, room):  # type: ignore[no-untyped-def]
    """As ``_score_wide``, of bfloat16."""
    num_heads, num_kv_heads, head_dim = scores.shape[0], keys.shape[1], keys.shape[2]
    if head_dim % PAIRED:
        _compiled_score_wide(query, row, scale, keys, values, slots, first, seen, scores, room)
        return
    stride, group_size = num_kv_heads * head_dim, num_heads // num_kv_heads
    of = row * query.shape[1]
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(values, slots, at, stride, base, head_dim)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                to = head * scores.shape[1] + column
                score_pairs(query, of + head * head_dim, scale, keys, slots, at, stride, base, head_dim, scores, to)


def _mix_in_pairs(weights, values, keys, slots, first, then, seen, mixed, room):  # type: ignore[no-untyped-def]
    """As ``_mix_wide``, of bfloat16; weights are rounded, as torch's attention rounds them."""
    num_heads, num_kv_heads, head_dim = weights.shape[0], keys.shape[1], keys.shape[2]
    if head_dim % PAIRED:
        _compiled_mix_wide(weights, values, keys, slots, first, then, seen, mixed, room)
        return
    stride, group_size = num_kv_heads * head_dim, num_heads // num_kv_heads
    rounded, pairs = room.rounded, room.pairs
    for column in range(0, seen, LANES):
        at = first + column
        for kv_head in range(num_kv_heads):
            base = kv_head * head_dim
            fetch_positions(keys, slots, min(then + column, slots.shape[0] - LANES), stride, base, head_dim)
            pair_positions(values, slots, at, stride, base, head_dim, pairs)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                for position in range(LANES):
                    rounded[position] = element_of(weights[head, column + position], rounded)
                add_pairs(rounded, 0, pairs, head_dim, mixed, head * head_dim)


def _score(*_arguments: Any) -> Any:
    """The one of the two that fits; only means something in compiled code."""
    raise NotImplementedError


def _mix(*_arguments: Any) -> Any:
    """Likewise."""
    raise NotImplementedError


@overload(_score)
def _overload_score(query, row, scale, keys, values, slots, first, seen, scores, room):  # type: ignore[no-untyped-def]
    return _score_in_pairs if keys.dtype == types.uint16 and has_pairs() else _score_wide


@overload(_mix)
def _overload_mix(weights, values, keys, slots, first, then, seen, mixed, room):  # type: ignore[no-untyped-def]
    return _mix_in_pairs if keys.dtype == types.uint16 and has_pairs() else _mix_wide


@compiled()
def _attend_share(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, rows, scale, window, softcap, sinks, out
):
    """One thread's rows."""
    num_heads, head_dim = out.shape[1], out.shape[2]
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
    scores = np.empty((num_heads, longest + LANES), np.float32)
    mixed = np.empty((num_heads, head_dim), np.float32)
    room = _Room(
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
        _score(query, row, np.float32(scale), keys, values, slots, first, seen, scores, room)
        for head in range(num_heads):
            if softcap > 0.0:
                _cap(scores[head, :seen], np.float32(softcap))
            _softmax(scores[head, :seen], sinks[head] if sinks.shape[0] else np.float32(-np.inf))
            for column in range(seen, seen + LANES - 1):
                scores[head, column] = np.float32(0.0)
        following = rows[min(index + 1, rows.shape[0] - 1)]
        then = starts[following] + (max(0, lengths[following] - window) if window else 0)
        _mix(scores, values, keys, slots, first, then, seen, mixed, room)
        for head in range(num_heads):
            for d in range(head_dim):
                out[row, head, d] = element_of(mixed[head, d], out)


@compiled_twice
def _attend_all(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, rows, bounds, scale, window, softcap, sinks, out
):
    """Attention of rows that each see the first keys of a sequence, their own at the end.

    Compiled for a dtype when it is first called with it, or read from the disk.

    Args:
        query: [rows, heads * head_dim], float32, or bfloat16 seen as uint16.
        keys: [slots, kv_heads, head_dim], of the same dtype.
        values: Likewise.
        slots: [positions] int32, where the keys of each sequence lie, one sequence after another. Fifteen more follow
            each sequence's last, whose keys and values are read, but count for nothing.
        starts: [rows] int64, where the sequence of each row begins in ``slots``.
        lengths: [rows] int64, keys that each row sees, its own included.
        rows: [rows] int64, in the order in which threads take them.
        bounds: [threads + 1] int64: thread t computes ``rows[bounds[t]:bounds[t + 1]]``.
        scale: Factor of the scores.
        window: Newest keys that a row sees; 0 for all.
        softcap: Bound of the scores; 0 for none.
        sinks: [heads] float32, a score of each head that has no value; [0] for none.
        out: [rows, heads, head_dim] of the query's dtype, which is overwritten.
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
    """Rotate queries and keys, store keys and values, finite or not, then attend: threads wake up once for all of it.

    Args:
        projected_at: Address of [rows, (heads + 2 * kv_heads) * head_dim]: each row's queries, keys, values; the
            queries are rotated in place, and the keys overwritten.
        out_at: Address of [rows, heads, head_dim].
        num_rows: All rows of the flat batch, whether ``rows`` has them or not.
        num_parts: Threads to rotate with.
        cos: [rows, head_dim] float32.
        sin: Likewise.
        new_slots: [rows] int64, where each row's key and value go.
        slots: As in ``attend_rows``; so are the next six.
        starts: Likewise.
        lengths: Likewise.
        rows: Likewise.
        bounds: Likewise.
        keys: Likewise.
        values: Likewise.
        num_heads: Of the queries.
        query_weight: As in ``rotate_row``; so are the next three.
        key_weight: Likewise.
        eps: Likewise.
        rounds_first: Likewise.
        scale: As in ``attend_rows``; so are the rest.
        window: Likewise.
        softcap: Likewise.
        sinks: Likewise.
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
    # A row sees keys of others, which all are stored by now.
    for part in prange(bounds.shape[0] - 1):
        share = rows[bounds[part] : bounds[part + 1]]
        _attend_share(projected, keys, values, slots, starts, lengths, share, scale, window, softcap, sinks, out)


attend_rows, attend_rows_in_parallel = _attend_all
rotate_and_attend, rotate_and_attend_in_parallel = _rotate_and_attend_all
