"""Attention of many rows of one sequence over paged keys and values, compiled by Numba for the host's processor.

Rows attend in tiles with an online softmax, in the order of FlashAttention (arXiv 2205.14135): for each tile of keys,
all rows of a unit compute their scores, rescale what they have summed so far, and add the weighted values. The query
heads of a key/value head share its tiles. So keys and values are read and packed once per unit, and scores stay in
the caches of the processor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from server.engine.cpu.amx_code import add_block, configure_tiles, multiply_block, release_tiles
from server.engine.cpu.bf16_dot import BF16_LANES, has_bf16_dot, interleave_positions
from server.engine.cpu.compiled import compiled, compiled_twice, element_of, exp, float32_of, is_bfloat16
from server.engine.cpu.tile_code import (
    TILE_KEYS,
    TILE_VECTORS,
    add_narrow_tile,
    add_tile,
    has_tile_registers,
    multiply_tile,
    rows_of_tile,
    softmax_tile,
    transpose_keys,
)
from server.engine.cpu.vector_code import LANES, widen_positions

_TILE_COLUMNS = TILE_VECTORS * LANES
_MINUS_INFINITY, _LOG2_E = np.float32(-np.inf), np.float32(1.44269504)
_ONE, _TWO, _NEAR = np.float32(1.0), np.float32(2.0), np.float32(1 / 16)
_T3, _T5, _T7, _T9 = (np.float32(factor) for factor in (-1 / 3, 2 / 15, -17 / 315, 62 / 2835))


class _Tiles(NamedTuple):
    """Buffers of one thread. Factors are float32, or bfloat16 viewed as uint16 (see ``tile_code``).

    R is the number of rows that are multiplied together, ``_rows_of(keys)``.

    Attributes:
        queries: [rows, width], factors; the width is the head's, rounded up to a multiple of ``_step_of``.
        keys: [width, TILE_KEYS], factors of one tile, transposed.
        values: [TILE_KEYS, width], factors of one tile.
        scores: [R, TILE_KEYS] float32.
        weights: [R, TILE_KEYS], factors.
        largest: [rows + LANES] float32, each row's largest score.
        sums: [rows, LANES] float32, partial sums of each row's weights.
        mixed: [rows, width] float32, the sums of weighted values.
        scales: [LANES] float32, the factors of the rows' earlier sums.
        lows: [R] int32, the first key of the tile that each row sees.
        highs: [R] int32, the key after the last.
    """

    queries: Any
    keys: Any
    values: Any
    scores: Any
    weights: Any
    largest: Any
    sums: Any
    mixed: Any
    scales: Any
    lows: Any
    highs: Any


def _new_factors(_shape: Any, _kind: Any) -> Any:
    """An array of zeros for factors of elements of ``_kind``, in compiled code only."""
    raise NotImplementedError


@overload(_new_factors, inline="always")
def _overload_new_factors(shape, kind):  # type: ignore[no-untyped-def]
    dtype = np.uint16 if kind.dtype == types.uint16 and has_bf16_dot() else np.float32
    return lambda shape, kind: np.zeros(shape, dtype)


def _factor_of(_element: Any, _array: Any) -> Any:
    """An element of a query, key or value in the type of ``_array``, in compiled code only."""
    raise NotImplementedError


@overload(_factor_of, inline="always")
def _overload_factor_of(element, array):  # type: ignore[no-untyped-def]
    if array.dtype == types.uint16:
        return lambda element, array: element
    return lambda element, array: float32_of(element)


def _pack_values(*_arguments: Any) -> Any:
    """Copy the values of sixteen positions into a tile, in compiled code only."""
    raise NotImplementedError


@overload(_pack_values, inline="always")
def _overload_pack_values(values, slots, at, stride, base, whole, packed, column):  # type: ignore[no-untyped-def]
    if packed.dtype == types.uint16:

        def interleave(values, slots, at, stride, base, whole, packed, column):  # type: ignore[no-untyped-def]
            width = packed.shape[1]
            interleave_positions(values, slots, at, stride, base, whole, packed, column * width, width)

        return interleave

    def widen(values, slots, at, stride, base, whole, packed, column):  # type: ignore[no-untyped-def]
        width = packed.shape[1]
        widen_positions(values, slots, at, stride, base, whole, packed, column * width, width)

    return widen


def _rows_of(_factors: Any) -> Any:
    """Rows that are multiplied together, by the type of the factors, in compiled code only."""
    raise NotImplementedError


@overload(_rows_of, inline="always")
def _overload_rows_of(factors):  # type: ignore[no-untyped-def]
    num_rows = rows_of_tile(factors)
    return lambda factors: num_rows


def _step_of(_factors: Any) -> Any:
    """Factors that are multiplied together, and columns of the smallest product, in compiled code only."""
    raise NotImplementedError


@overload(_step_of, inline="always")
def _overload_step_of(factors):  # type: ignore[no-untyped-def]
    step = BF16_LANES if has_tile_registers(factors) else LANES
    return lambda factors: step


def _begin(_factors: Any) -> Any:
    """Prepare this thread for products of factors, in compiled code only."""
    raise NotImplementedError


@overload(_begin, inline="always")
def _overload_begin(factors):  # type: ignore[no-untyped-def]
    return (lambda factors: configure_tiles()) if has_tile_registers(factors) else (lambda factors: None)


def _end(_factors: Any) -> Any:
    """Undo ``_begin``, in compiled code only."""
    raise NotImplementedError


@overload(_end, inline="always")
def _overload_end(factors):  # type: ignore[no-untyped-def]
    return (lambda factors: release_tiles()) if has_tile_registers(factors) else (lambda factors: None)


def _score(*_arguments: Any) -> Any:
    """Multiply the queries of some rows by the keys of a tile, in compiled code only."""
    raise NotImplementedError


@overload(_score, inline="always")
def _overload_score(queries, at, width, keys, num_keys, scores):  # type: ignore[no-untyped-def]
    if has_tile_registers(queries):

        def by_registers(queries, at, width, keys, num_keys, scores):  # type: ignore[no-untyped-def]
            multiply_block(queries, at, width, keys, TILE_KEYS, num_keys, scores)

        return by_registers

    def by_vectors(queries, at, width, keys, num_keys, scores):  # type: ignore[no-untyped-def]
        size = 2 if is_bfloat16(keys) else 1
        for key in range(0, num_keys, _TILE_COLUMNS):
            multiply_tile(queries, at, width, keys, size * key, TILE_KEYS, width, scores, key, TILE_KEYS)

    return by_vectors


def _mix(*_arguments: Any) -> Any:
    """Scale what some rows have summed, and add the weighted values of a tile, in compiled code only."""
    raise NotImplementedError


@overload(_mix, inline="always")
def _overload_mix(weights, num_keys, values, width, mixed, at, scales):  # type: ignore[no-untyped-def]
    if has_tile_registers(weights):

        def by_registers(weights, num_keys, values, width, mixed, at, scales):  # type: ignore[no-untyped-def]
            add_block(weights, TILE_KEYS, num_keys, values, width, mixed, at, scales)

        return by_registers

    def by_vectors(weights, num_keys, values, width, mixed, at, scales):  # type: ignore[no-untyped-def]
        size = 2 if is_bfloat16(values) else 1
        whole = width // _TILE_COLUMNS * _TILE_COLUMNS
        for d in range(0, whole, _TILE_COLUMNS):
            add_tile(weights, 0, TILE_KEYS, values, size * d, width, num_keys, mixed, at + d, width, scales, 0)
        for d in range(whole, width, LANES):
            add_narrow_tile(weights, 0, TILE_KEYS, values, size * d, width, num_keys, mixed, at + d, width, scales, 0)

    return by_vectors


@compiled()
def _pack_tile(keys, values, slots, first, kv_head, tiles):  # type: ignore[no-untyped-def]
    """Pack the keys and values of one head at ``slots[first:first + TILE_KEYS]``."""
    head_dim, stride, base = keys.shape[2], keys.shape[1] * keys.shape[2], kv_head * keys.shape[2]
    packed_keys, packed_values = tiles.keys, tiles.values
    size = 2 if is_bfloat16(packed_keys) else 1
    whole = head_dim // (LANES * size) * (LANES * size)
    width = packed_values.shape[1]
    flat_keys, flat_values = packed_keys.reshape(-1), packed_values.reshape(-1)
    for column in range(0, TILE_KEYS, LANES):
        transpose_keys(keys, slots, first + column, stride, base, whole, packed_keys, size * column)
        _pack_values(values, slots, first + column, stride, base, whole, packed_values, column)
    for column in range(TILE_KEYS if whole < head_dim else 0):
        slot = slots[first + column]
        for d in range(whole, head_dim):
            at = (d - d % size) * TILE_KEYS + size * column + d % size
            flat_keys[at] = _factor_of(keys[slot, kv_head, d], packed_keys)
            at = (column - column % size) * width + size * d + column % size
            flat_values[at] = _factor_of(values[slot, kv_head, d], packed_values)


@compiled()
def _cap(scores, scale, softcap):  # type: ignore[no-untyped-def]
    """Scale and cap the scores of one tile in place.

    tanh(x) is 1 - 2 / (exp(2 x) + 1). Near 0 that loses digits, so its Taylor series up to x**9 is used there.
    """
    for row in range(scores.shape[0]):
        for key in range(scores.shape[1]):
            x = scores[row, key] * scale / softcap
            square = x * x
            series = x * (_ONE + square * (_T3 + square * (_T5 + square * (_T7 + square * _T9))))
            far = _ONE - _TWO / (exp(x + x) + _ONE)
            scores[row, key] = softcap * (series if square < _NEAR else far)


@compiled()
def _attend_tile(tiles, num_rows, column, lengths, num_heads, scale, window, softcap):  # type: ignore[no-untyped-def]
    """Let the rows of a unit attend to the packed tile, whose first key is number ``column`` of the sequence.

    Args:
        tiles: The buffers.
        num_rows: A multiple of R; rows past the last are zero.
        column: The number of the tile's first key.
        lengths: [positions], the number of keys that each position of the unit sees.
        num_heads: Rows of each position.
        scale: Factor of the scores.
        window: Number of newest keys that a row sees; 0 for all.
        softcap: Bound of the scores; 0 for none.
    """
    # Taken out of the tuple once: each time, Numba counts a reference, which is slow beside this loop.
    queries, keys, values, scores, weights = tiles.queries, tiles.keys, tiles.values, tiles.scores, tiles.weights
    largest, sums, mixed, scales = tiles.largest, tiles.sums, tiles.mixed, tiles.scales
    lows, highs = tiles.lows, tiles.highs
    width, last = queries.shape[1], lengths.shape[0] - 1
    block, step = _rows_of(keys), _step_of(keys)
    factor = np.float32(_LOG2_E if softcap > 0.0 else scale * _LOG2_E)
    for row in range(0, num_rows, block):
        shortest = lengths[min(row // num_heads, last)]
        longest = lengths[min((row + block - 1) // num_heads, last)]
        if longest <= column or (window and shortest - window >= column + TILE_KEYS):
            continue
        num_keys = min(TILE_KEYS, (longest - column + step - 1) // step * step)
        at = row * width
        _score(queries, at, width, keys, num_keys, scores)
        if softcap > 0.0:
            _cap(scores, scale, softcap)
        num_whole = min(num_keys, max(0, shortest - column) // LANES * LANES)
        if window and longest - window > column:
            num_whole = 0
        if num_whole < num_keys:
            for index in range(block):
                high = lengths[min((row + index) // num_heads, last)]
                lows[index] = high - window - column if window else 0
                highs[index] = high - column
        softmax_tile(scores, num_whole, num_keys, lows, highs, factor, row, largest, sums, scales, weights)
        _mix(weights, num_keys, values, width, mixed, at, scales)


@compiled()
def _attend_unit(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, start, stop, kv_head, scale, window, softcap, sinks, out, tiles
):
    """Attention of the rows ``start`` to ``stop - 1`` and the query heads of one key/value head."""
    head_dim, group_size = keys.shape[2], out.shape[1] // keys.shape[1]
    num_rows = (stop - start) * group_size
    first_head = kv_head * group_size
    # Taken out of the tuple once, as in _attend_tile.
    queries, largest, sums, mixed = tiles.queries, tiles.largest, tiles.sums, tiles.mixed
    for position in range(start, stop):
        for head in range(group_size):
            row = (position - start) * group_size + head
            for d in range(head_dim):
                queries[row, d] = _factor_of(query[position, (first_head + head) * head_dim + d], queries)
    block = _rows_of(queries)
    num_padded = (num_rows + block - 1) // block * block
    queries[num_rows:num_padded] = 0
    largest[:num_padded] = _MINUS_INFINITY
    sums[:num_padded] = 0
    mixed[:num_padded] = 0
    seen = lengths[start:stop]
    first = max(0, seen[0] - window) // TILE_KEYS * TILE_KEYS if window else 0
    for column in range(first, seen[-1], TILE_KEYS):
        _pack_tile(keys, values, slots, starts[start] + column, kv_head, tiles)
        _attend_tile(tiles, num_padded, column, seen, group_size, scale, window, softcap)
    for row in range(num_rows):
        position, head = start + row // group_size, first_head + row % group_size
        total = np.float32(0.0)
        for lane in range(LANES):
            total += sums[row, lane]
        if sinks.shape[0]:
            total += np.exp(sinks[head] - largest[row] / _LOG2_E)
        for d in range(head_dim):
            out[position, head, d] = element_of(mixed[row, d] / total, out)


@compiled_twice
def _attend_all_tiles(  # type: ignore[no-untyped-def]
    query, keys, values, slots, starts, lengths, units, bounds, max_positions, scale, window, softcap, sinks, out
):
    """Attention of rows that each see the keys of a sequence up to their own position.

    Arguments that are not listed are those of ``decode_kernel.attend_rows``.

    Args:
        query: [rows, at least heads * head_dim]: each row's queries first.
        slots: ``TILE_KEYS - 1`` padding slots follow each sequence that the units refer to.
        units: [units, 3] int64: first row, row after the last, key/value head. The rows of a unit are consecutive
            positions of one sequence.
        bounds: [threads + 1] int64: thread t computes ``units[bounds[t]:bounds[t + 1]]``.
        max_positions: Most rows of a unit.
    """
    for part in prange(bounds.shape[0] - 1):
        queries = _new_factors((1, 1), keys)  # for its type
        block, step = _rows_of(queries), _step_of(queries)
        num_padded = max_positions * (out.shape[1] // keys.shape[1]) + block - 1
        width = (keys.shape[2] + step - 1) // step * step
        tiles = _Tiles(
            _new_factors((num_padded, width), keys),
            _new_factors((width, TILE_KEYS), keys),
            _new_factors((TILE_KEYS, width), keys),
            np.empty((block, TILE_KEYS), np.float32),
            _new_factors((block, TILE_KEYS), keys),
            np.empty(num_padded + LANES, np.float32),
            np.empty((num_padded, LANES), np.float32),
            np.empty((num_padded, width), np.float32),
            np.empty(LANES, np.float32),
            np.empty(block, np.int32),
            np.empty(block, np.int32),
        )
        _begin(queries)
        for index in range(bounds[part], bounds[part + 1]):
            _attend_unit(
                query, keys, values, slots, starts, lengths, units[index, 0], units[index, 1], units[index, 2],
                np.float32(scale), window, np.float32(softcap), sinks, out, tiles,
            )  # fmt: skip
        _end(queries)


attend_tiles, attend_tiles_in_parallel = _attend_all_tiles
