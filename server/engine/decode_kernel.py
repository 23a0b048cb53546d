"""Attention of single rows over paged keys and values, compiled by Numba for the processor that it runs on.

Keys are read where they lie, sixteen positions at a time and all heads of a position together, so memory is walked
once and in order; gathering them first, as torch's SDPA needs it, would write and read them once more. Numba needs no
compiler on the machine. Its threads are OpenMP's, which torch has started already.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from server.engine.compiled import array_at, compiled, compiled_twice, element_of, exp, float32_of
from server.engine.row_kernels import rotate_row
from server.engine.vector_code import LANES, add_positions, fetch_positions, score_positions


@compiled()
def _largest(scores):  # type: ignore[no-untyped-def]
    largest = np.float32(-np.inf)
    for index in range(scores.shape[0]):
        # LLVM makes one instruction of this, and a chain of them of max().
        largest = scores[index] if scores[index] > largest else largest  # noqa: FURB136
    return largest


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


@compiled()
def _score(own, keys, values, slots, first, seen, group_size, scores):  # type: ignore[no-untyped-def]
    num_kv_heads, head_dim = keys.shape[1], keys.shape[2]
    whole = head_dim // LANES * LANES
    for column in range(0, seen, LANES):
        for kv_head in range(num_kv_heads):
            fetch_positions(values, slots, first + column, num_kv_heads * head_dim, kv_head * head_dim, head_dim)
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                score_positions(
                    own,
                    head * head_dim,
                    keys,
                    slots,
                    first + column,
                    num_kv_heads * head_dim,
                    kv_head * head_dim,
                    whole,
                    scores,
                    head * scores.shape[1] + column,
                )
                if whole < head_dim:
                    for position in range(LANES):
                        key = keys[slots[first + column + position], kv_head]
                        for d in range(whole, head_dim):
                            scores[head, column + position] += own[head, d] * float32_of(key[d])


@compiled()
def _mix(weights, values, keys, slots, first, then, seen, group_size, mixed):  # type: ignore[no-untyped-def]
    num_kv_heads, head_dim = values.shape[1], values.shape[2]
    whole = head_dim // LANES * LANES
    for column in range(0, seen, LANES):
        for kv_head in range(num_kv_heads):
            fetch_positions(
                keys,
                slots,
                min(then + column, slots.shape[0] - LANES),
                num_kv_heads * head_dim,
                kv_head * head_dim,
                head_dim,
            )
            for head in range(kv_head * group_size, (kv_head + 1) * group_size):
                add_positions(
                    weights,
                    head * weights.shape[1] + column,
                    values,
                    slots,
                    first + column,
                    num_kv_heads * head_dim,
                    kv_head * head_dim,
                    whole,
                    mixed,
                    head * head_dim,
                )
                if whole < head_dim:
                    for position in range(LANES):
                        value = values[slots[first + column + position], kv_head]
                        for d in range(whole, head_dim):
                            mixed[head, d] += weights[head, column + position] * float32_of(value[d])


@compiled()
def _attend_share(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, rows, scale, window, softcap, sinks, out
):
    """One thread's rows."""
    num_heads, head_dim, num_kv_heads = out.shape[1], out.shape[2], keys.shape[1]
    group_size = num_heads // num_kv_heads
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
    scores = np.empty((num_heads, longest + LANES), np.float32)
    own = np.empty((num_heads, head_dim), np.float32)
    mixed = np.empty((num_heads, head_dim), np.float32)
    for index in range(rows.shape[0]):
        row = rows[index]
        skipped = max(0, lengths[row] - window) if window else 0
        seen = lengths[row] - skipped
        first = starts[row] + skipped
        for head in range(num_heads):
            for d in range(head_dim):
                own[head, d] = float32_of(query[row, head * head_dim + d]) * np.float32(scale)
                mixed[head, d] = np.float32(0.0)
        _score(own, keys, values, slots, first, seen, group_size, scores)
        for head in range(num_heads):
            if softcap > 0.0:
                _cap(scores[head, :seen], np.float32(softcap))
            _softmax(scores[head, :seen], sinks[head] if sinks.shape[0] else np.float32(-np.inf))
            for column in range(seen, seen + LANES - 1):
                scores[head, column] = np.float32(0.0)
        following = rows[min(index + 1, rows.shape[0] - 1)]
        then = starts[following] + (max(0, lengths[following] - window) if window else 0)
        _mix(scores, values, keys, slots, first, then, seen, group_size, mixed)
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
    """Rotate queries and keys, store keys and values, then attend: threads wake up once for all of it.

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
