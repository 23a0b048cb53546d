"""The changes of adapters to the rows of a product, compiled by Numba.

One call changes all rows of a product, whatever their adapters are. Rows of one adapter are computed together, at
most eight at a time, or sixteen by AMX, so its matrices are read once for them. Only addresses cross into compiled
code: converting an array takes microseconds, for each product of each step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numba.extending import overload

from server.engine.cpu.adapter_code import add_1, add_2, add_4, add_8, multiply_1, multiply_2, multiply_4, multiply_8
from server.engine.cpu.adapter_tiles import SUMS, add_products, scaled_products, shape_products
from server.engine.cpu.amx_code import AMX_ROWS, release_tiles
from server.engine.cpu.bf16_dot import BF16_LANES
from server.engine.cpu.compiled import array_at, compiled, compiled_twice, element_of, float32_of
from server.engine.cpu.tile_code import has_tile_registers
from server.engine.cpu.vector_code import LANES

MAX_ROWS = AMX_ROWS
"""Rows that are computed together."""

LEAST_TILE_ROWS = 3
"""Rows from which on AMX is faster."""

MAX_ADAPTERS, MAX_PRODUCTS = 1 << 30, 1 << 20
"""Bounds of the tables, whose lengths the kernels do not need."""

NUM_FIELDS = 5
A, NUM_BLOCKS, SCALES, NUM_PARTS, PARTS = range(NUM_FIELDS)
"""Fields of a product in an adapter's table: the address of A (all parts' rows one after another, in blocks of
sixteen), their number, the address of a float32 scale for each row, the number of parts and the address of their
fields. Without an A, the number of blocks is 0."""

NUM_PART_FIELDS = 7
START, SIZE, FIRST, RANK, B, GAIN, BIAS = range(NUM_PART_FIELDS)
"""Fields of a part: its first column and number of columns, its first row of A and its number of rows (even), the
addresses of B in blocks of sixteen columns (the last block is padded), of the gain and of the bias; 0 for none."""

NUM_STEP_FIELDS = 5
NUM_SHARES, BOUNDS, UNITS, ROWS, TABLES = range(NUM_STEP_FIELDS)
"""Fields of a step: the number of threads' shares, and the addresses of each share's first unit, of the units (number
of the adapter, first row, number of rows), of the rows' numbers, and of the addresses of the adapters' tables."""

_INT, _FLOAT = np.empty(0, np.int64), np.empty(0, np.float32)


@compiled()
def _multiply(count, left, starts, right, right_at, steps, blocks, out, out_stride):  # type: ignore[no-untyped-def]
    if count == 8:
        multiply_8(left, starts, right, right_at, steps, blocks, out, out_stride)
    elif count == 4:
        multiply_4(left, starts, right, right_at, steps, blocks, out, out_stride)
    elif count == 2:
        multiply_2(left, starts, right, right_at, steps, blocks, out, out_stride)
    else:
        multiply_1(left, starts, right, right_at, steps, blocks, out, out_stride)


@compiled()
def _add(count, left, starts, right, right_at, steps, blocks, out, out_starts):  # type: ignore[no-untyped-def]
    if count == 8:
        add_8(left, starts, right, right_at, steps, blocks, out, out_starts)
    elif count == 4:
        add_4(left, starts, right, right_at, steps, blocks, out, out_starts)
    elif count == 2:
        add_2(left, starts, right, right_at, steps, blocks, out, out_starts)
    else:
        add_1(left, starts, right, right_at, steps, blocks, out, out_starts)


class _Buffers(NamedTuple):
    """Buffers of one thread; R is ``MAX_ROWS``.

    Attributes:
        low: [R, ranks] float32, products with A.
        factors: [R, ranks], the same, scaled and rounded.
        gathered: [R, width], rows that do not follow each other.
        sums: [R, LANES] float32, products with one block of B.
        tile_sums: [SUMS] float32, what AMX has summed.
        starts: [R] int64, first elements of rows.
        firsts: [R] int64, first elements of the rows of ``factors``.
        own: [R] int64, first elements of a part's factors.
        targets: [R] int64, first elements of a part's output.
        shape: [2] int64, of the tile registers: their rows, or 0 for none, and steps of the tail.
    """

    low: Any
    factors: Any
    gathered: Any
    sums: Any
    tile_sums: Any
    starts: Any
    firsts: Any
    own: Any
    targets: Any
    shape: Any


@compiled()
def _new_buffers(num_ranks, width, kind):  # type: ignore[no-untyped-def]
    firsts, shape = np.arange(MAX_ROWS) * num_ranks, np.zeros(2, np.int64)
    return _Buffers(
        np.empty((MAX_ROWS, num_ranks), np.float32),
        np.empty((MAX_ROWS, num_ranks), kind.dtype),
        np.empty((MAX_ROWS, width), kind.dtype),
        np.empty((MAX_ROWS, LANES), np.float32),
        np.empty(SUMS, np.float32),
        np.empty(MAX_ROWS, np.int64),
        firsts,
        np.empty(MAX_ROWS, np.int64),
        np.empty(MAX_ROWS, np.int64),
        shape,
    )


@compiled()
def _is_plain(fields):  # type: ignore[no-untyped-def]
    """Whether a part only adds products."""
    return fields[B] != 0 and fields[GAIN] == 0 and fields[BIAS] == 0


@compiled()
def _change_blocks(chosen, fields, first_block, out, factors_at, buffers):  # type: ignore[no-untyped-def]
    """Change some columns of one part of at most eight rows, by elements.

    Args:
        chosen: Numbers of the rows.
        fields: The part.
        first_block: The first block of its columns to change.
        out: The product's output.
        factors_at: Row of ``buffers.factors`` of the first of the rows.
        buffers: With the factors.
    """
    count, size, rank = len(chosen), fields[SIZE], fields[RANK]
    blocks = (size + LANES - 1) // LANES
    has_b, has_gain, has_bias = fields[B] != 0, fields[GAIN] != 0, fields[BIAS] != 0
    b = array_at(fields[B] if has_b else fields[GAIN], (blocks, rank, LANES), out)
    gain = array_at(fields[GAIN], (size,), _FLOAT)
    bias = array_at(fields[BIAS], (size,), _FLOAT)
    own, sums = buffers.own, buffers.sums
    for row in range(count):
        own[row] = buffers.firsts[factors_at + row] + fields[FIRST]
    for block in range(first_block, blocks):
        if has_b:
            _multiply(count, buffers.factors, own, b, block * rank * LANES, rank, 1, sums, LANES)
        first, width = block * LANES, min(LANES, size - block * LANES)
        for row in range(count):
            line = out[chosen[row]]
            for column in range(width):
                at = fields[START] + first + column
                value = float32_of(line[at])
                if has_gain:
                    value *= gain[first + column]
                if has_b:
                    value += sums[row, column]
                if has_bias:
                    value += bias[first + column]
                line[at] = element_of(value, line)


@compiled()
def _change_part(chosen, fields, out, buffers):  # type: ignore[no-untyped-def]
    """Change one part of at most eight rows, by vectors as far as it only adds products."""
    num_whole = 0
    if _is_plain(fields):
        num_whole = fields[SIZE] // LANES
        b = array_at(fields[B], (num_whole, fields[RANK], LANES), out)
        for row in range(len(chosen)):
            buffers.own[row] = buffers.firsts[row] + fields[FIRST]
            buffers.targets[row] = chosen[row] * out.shape[1] + fields[START]
        _add(len(chosen), buffers.factors, buffers.own, b, 0, fields[RANK], num_whole, out, buffers.targets)
    _change_blocks(chosen, fields, num_whole, out, 0, buffers)


@compiled()
def _rows_at_once(left):  # type: ignore[no-untyped-def]
    """How many rows vectors compute together, of those that are left."""
    return 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@compiled()
def _change_by_vectors(chosen, rows, a, scales, parts, out, buffers):  # type: ignore[no-untyped-def]
    """Change at most eight rows."""
    count, low, factors = len(chosen), buffers.low, buffers.factors
    for row in range(count):
        buffers.starts[row] = chosen[row] * rows.shape[1]
    _multiply(count, rows, buffers.starts, a, 0, rows.shape[1], a.shape[0], low, low.shape[1])
    for row in range(count):
        for index in range(len(scales)):
            factors[row, index] = element_of(low[row, index] * scales[index], factors)
    for part in range(parts.shape[0]):
        _change_part(chosen, parts[part], out, buffers)


def _change_by_tiles(*_arguments: Any) -> Any:
    """Change some of the rows ``chosen`` by AMX, in compiled code only.

    Returns:
        How many: 0 if AMX does not suit them.
    """
    raise NotImplementedError


@overload(_change_by_tiles)
def _overload_change_by_tiles(chosen, rows, a, scales, parts, out, buffers):  # type: ignore[no-untyped-def]
    if not has_tile_registers(rows):
        return lambda chosen, rows, a, scales, parts, out, buffers: 0

    def change(chosen, rows, a, scales, parts, out, buffers):  # type: ignore[no-untyped-def]
        count, width, num_blocks = min(len(chosen), AMX_ROWS), rows.shape[1], a.shape[0]
        if count < LEAST_TILE_ROWS or width % BF16_LANES:
            return 0
        shape, factors, sums = buffers.shape, buffers.factors, buffers.tile_sums
        if shape[0] != count:
            shape_products(count, shape[1])
            shape[0] = count
        given, given_at, stride = rows, chosen[0] * width, factors.shape[1]
        if chosen[count - 1] - chosen[0] != count - 1:
            given, given_at = buffers.gathered, 0
            for row in range(count):
                given[row] = rows[chosen[row]]
        scaled_products(given, given_at, width, a, width, num_blocks, scales, factors, stride, count, sums)
        for part in range(parts.shape[0]):
            fields, num_whole = parts[part], 0
            if _is_plain(fields):
                rank, num_whole = fields[RANK], fields[SIZE] // LANES
                if shape[1] != rank % BF16_LANES:
                    shape[1] = rank % BF16_LANES
                    shape_products(count, shape[1])
                b = array_at(fields[B], (num_whole, rank, LANES), rows)
                for row in range(count):
                    buffers.targets[row] = chosen[row] * out.shape[1] + fields[START]
                add_products(factors, fields[FIRST], stride, b, rank, num_whole, out, buffers.targets, count, sums)
            first = 0
            while first < count and num_whole * LANES < fields[SIZE]:
                some = _rows_at_once(count - first)
                _change_blocks(chosen[first : first + some], fields, num_whole, out, first, buffers)
                first += some
        return count

    return change


def _end_tiles(*_arguments: Any) -> Any:
    """Release the tile registers if they have a shape, in compiled code only."""
    raise NotImplementedError


@overload(_end_tiles)
def _overload_end_tiles(kind, buffers):  # type: ignore[no-untyped-def]
    if not has_tile_registers(kind):
        return lambda kind, buffers: None

    def end(kind, buffers):  # type: ignore[no-untyped-def]
        if buffers.shape[0] > 0:
            release_tiles()

    return end


@compiled()
def _change_share(step, share, rows_at, out_at, num_rows, width, out_width, product, kind):  # type: ignore[no-untyped-def]
    """The rows of one thread."""
    num_shares = step[NUM_SHARES]
    bounds = array_at(step[BOUNDS], (num_shares + 1,), _INT)
    units = array_at(step[UNITS], (bounds[num_shares], 3), _INT)
    numbers = array_at(step[ROWS], (num_rows,), _INT)
    tables = array_at(step[TABLES], (MAX_ADAPTERS,), _INT)
    rows = array_at(rows_at, (num_rows, width), kind)
    out = array_at(out_at, (num_rows, out_width), kind)
    most = 0
    for unit in range(bounds[share], bounds[share + 1]):
        most = max(most, array_at(tables[units[unit, 0]], (MAX_PRODUCTS, NUM_FIELDS), _INT)[product, NUM_BLOCKS])
    buffers = _new_buffers(most * LANES, width, kind)
    for unit in range(bounds[share], bounds[share + 1]):
        fields = array_at(tables[units[unit, 0]], (MAX_PRODUCTS, NUM_FIELDS), _INT)[product]
        first, stop = units[unit, 1], units[unit, 1] + units[unit, 2]
        a = array_at(fields[A], (fields[NUM_BLOCKS], width, LANES), kind)
        scales = array_at(fields[SCALES], (fields[NUM_BLOCKS] * LANES,), _FLOAT)
        parts = array_at(fields[PARTS], (fields[NUM_PARTS], NUM_PART_FIELDS), _INT)
        while first < stop and fields[NUM_PARTS] > 0:
            count = _change_by_tiles(numbers[first:stop], rows, a, scales, parts, out, buffers)
            if count == 0:
                count = _rows_at_once(stop - first)
                _change_by_vectors(numbers[first : first + count], rows, a, scales, parts, out, buffers)
            first += count
    _end_tiles(kind, buffers)


@compiled_twice
def _change_all(step_at, rows_at, out_at, num_rows, width, out_width, product, kind):  # type: ignore[no-untyped-def]
    """Change the rows of a product that have adapters.

    Args:
        step_at: Address of the fields of the step.
        rows_at: Address of the product's input [num_rows, width].
        out_at: Address of its output [num_rows, out_width], changed in place.
        num_rows: All rows of the pass.
        width: Input features; even for bfloat16.
        out_width: Output features.
        product: Number of the product in the adapters' tables.
        kind: One of ``KINDS``.
    """
    step = array_at(step_at, (NUM_STEP_FIELDS,), _INT)
    for share in prange(step[NUM_SHARES]):
        _change_share(step, share, rows_at, out_at, num_rows, width, out_width, product, kind)


@compiled()
def embed_rows(step_at, ids_at, out_at, num_rows, vocabulary, out_width, product, kind):  # type: ignore[no-untyped-def]
    """``change_rows`` for embeddings: A is [vocabulary, rank], and the product with it is a row of it.

    Args:
        ids_at: Address of token ids [num_rows] int64.
        vocabulary: Rows of A.
    """
    step = array_at(step_at, (NUM_STEP_FIELDS,), _INT)
    bounds = array_at(step[BOUNDS], (step[NUM_SHARES] + 1,), _INT)
    units = array_at(step[UNITS], (bounds[step[NUM_SHARES]], 3), _INT)
    numbers = array_at(step[ROWS], (num_rows,), _INT)
    tables = array_at(step[TABLES], (MAX_ADAPTERS,), _INT)
    ids = array_at(ids_at, (num_rows,), _INT)
    out = array_at(out_at, (num_rows, out_width), kind)
    for unit in range(len(units)):
        table = array_at(tables[units[unit, 0]], (MAX_PRODUCTS, NUM_FIELDS), _INT)
        fields = table[product]
        if fields[NUM_PARTS] == 0:
            continue
        rank = fields[NUM_BLOCKS] * LANES
        a = array_at(fields[A], (vocabulary, rank), kind)
        scales = array_at(fields[SCALES], (rank,), _FLOAT)
        parts = array_at(fields[PARTS], (fields[NUM_PARTS], NUM_PART_FIELDS), _INT)
        buffers = _new_buffers(rank, 0, kind)
        factors = buffers.factors
        for index in range(units[unit, 1], units[unit, 1] + units[unit, 2]):
            for column in range(rank):
                element = float32_of(a[ids[numbers[index]], column])
                factors[0, column] = element_of(element * scales[column], factors)
            for part in range(fields[NUM_PARTS]):
                _change_part(numbers[index : index + 1], parts[part], out, buffers)


change_rows, change_rows_in_parallel = _change_all
