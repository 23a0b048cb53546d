"""LLVM code for products of a few rows, at arbitrary places, with the matrices of adapters.

A matrix is stored in blocks of sixteen columns, [columns / 16, steps, 16]; for bfloat16 [columns / 16, steps / 2, 16,
2], the pairs that VDPBF16PS multiplies. So a product reads it once and in order, for all of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic

from server.engine.cpu.bf16_dot import BFloat16Code
from server.engine.cpu.tile_code import TileCode
from server.engine.cpu.vector_code import LANES, LONG, ZERO

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

CHAINS = 8
"""Independent sums of a product: with fewer, each instruction would wait for the one before it."""

AHEAD = 1024
"""Elements of a matrix that are fetched ahead: the processor's own prefetcher stops at the end of each page."""


class _PairCode(BFloat16Code, TileCode):
    """Products by VDPBF16PS."""


def _code(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
    kind = _PairCode if signature.args[0].dtype == types.uint16 else TileCode
    return kind(context, builder, signature.args, arguments)


def _sums(code: Any, starts: Sequence[Any], right: int, right_at: Any, steps: Any) -> list[Any]:
    """Products of rows of array 0, from some elements on, with one block of columns: sixteen sums for each row."""
    builder, size = code.builder, code.step // LANES
    unroll = max(1, CHAINS // len(starts))
    chains = [[alloca_once_value(builder, ZERO) for _ in range(unroll)] for _ in starts]
    stride = LONG(size * unroll)
    whole = builder.sub(steps, builder.srem(steps, stride))

    def add(at: Any, which: int) -> None:
        line = builder.add(right_at, builder.mul(at, LONG(LANES)))
        factors = code.factors(right, line)
        code.fetch(right, builder.add(line, LONG(AHEAD)))
        for start, sums in zip(starts, chains, strict=True):
            factor = code.repeated_factor(0, builder.add(start, at))
            builder.store(code.multiply_add(factor, factors, builder.load(sums[which])), sums[which])

    with for_range_slice(builder, LONG(0), whole, stride) as (at, _):
        for which in range(unroll):
            add(builder.add(at, LONG(size * which)), which)
    with for_range_slice(builder, whole, steps, LONG(size)) as (at, _):
        add(at, 0)
    totals = []
    for sums in chains:
        parts = [builder.load(total) for total in sums]
        while len(parts) > 1:
            parts = [code.add(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        totals.append(parts[0])
    return totals


def _starts(code: Any, array: int, count: int) -> list[Any]:
    return [code.builder.load(code.pointer(array, LONG(index), ir.IntType(64), LONG)) for index in range(count)]


def _multiply_rows(count: int) -> Any:
    @_intrinsic
    def multiply_rows(  # type: ignore[no-untyped-def]
        _context, left, starts, right, right_at, steps, blocks, out, out_stride
    ):
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            code = _code(context, builder, signature, arguments)
            right_at, steps, blocks, out_stride = (arguments[index] for index in (3, 4, 5, 7))
            places = _starts(code, 1, count)
            block_size = builder.mul(steps, LONG(LANES))
            with for_range_slice(builder, LONG(0), blocks, LONG(1)) as (block, _):
                first = builder.add(right_at, builder.mul(block, block_size))
                for row, total in enumerate(_sums(code, places, 2, first, steps)):
                    place = builder.add(builder.mul(LONG(row), out_stride), builder.mul(block, LONG(LANES)))
                    code.store(total, 6, place)
            return context.get_dummy_value()

        return types.void(left, starts, right, right_at, steps, blocks, out, out_stride), generate

    return multiply_rows


def _add_rows(count: int) -> Any:
    @_intrinsic
    def add_rows(  # type: ignore[no-untyped-def]
        _context, left, starts, right, right_at, steps, blocks, out, out_starts
    ):
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            code = _code(context, builder, signature, arguments)
            right_at, steps, blocks = (arguments[index] for index in (3, 4, 5))
            places, targets = _starts(code, 1, count), _starts(code, 7, count)
            block_size = builder.mul(steps, LONG(LANES))
            with for_range_slice(builder, LONG(0), blocks, LONG(1)) as (block, _):
                first = builder.add(right_at, builder.mul(block, block_size))
                totals = _sums(code, places, 2, first, steps)
                for target, total in zip(targets, totals, strict=True):
                    place = builder.add(target, builder.mul(block, LONG(LANES)))
                    code.store_weights(code.add(code.load(6, place), total), 6, place)
            return context.get_dummy_value()

        return types.void(left, starts, right, right_at, steps, blocks, out, out_starts), generate

    return add_rows


multiply_1, multiply_2, multiply_4, multiply_8 = (_multiply_rows(count) for count in (1, 2, 4, 8))
"""Multiply some rows by a matrix.

Args:
    left: float32, or bfloat16 viewed as uint16, as ``right``; all arrays are C-contiguous and indexed as flat.
    starts: int64, the first element of each row in ``left``.
    right: The matrix, in blocks of sixteen columns.
    right_at: int64, as all other scalars: its first element.
    steps: Elements of each row; even for bfloat16.
    blocks: Blocks of columns.
    out: float32; the sums of row r start at ``r * out_stride``.
    out_stride: Elements from row to row.
"""

add_1, add_2, add_4, add_8 = (_add_rows(count) for count in (1, 2, 4, 8))
"""Add such products to rows of ``out``, which is of the type of ``left`` and rounded: the arguments are those of
``multiply_1``, but for ``out_starts``, the first element of each row in ``out``."""
