"""LLVM code for products of up to sixteen rows with the matrices of adapters by AMX.

A block of columns, as ``adapter_code`` stores it, is what AMX multiplies: 32 steps of sixteen columns fill a tile
register. What is left of the rank of B, which is often less than 32, has registers of its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once, for_range_slice
from numba.extending import intrinsic

from server.engine.cpu.adapter_code import AHEAD
from server.engine.cpu.amx_code import AMX_ROWS, AMXCode
from server.engine.cpu.bf16_dot import BF16_LANES, BFloat16Code
from server.engine.cpu.tile_code import TileCode
from server.engine.cpu.vector_code import LANES, LONG

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

_LEFT, _RIGHTS = 2, (3, 4)
_LEFT_TAIL, _RIGHT_TAILS = 5, (6, 7)
"""Tile registers of the factors, and of the last steps; registers 0 and 1 hold sums."""

SUMS = AMX_ROWS * 2 * LANES
"""Sums of one product: a buffer of so many float32."""

_BYTE, _LINE_BYTES = ir.IntType(8), 64


class _ProductCode(AMXCode, BFloat16Code, TileCode):
    """Code of the products."""

    def shape_tiles(self, rows: Any, tail: Any) -> None:
        """Give the registers their sizes: ``rows`` rows, and ``tail`` steps for the last ones."""
        builder = self.builder
        has_tail = builder.icmp_signed("!=", tail, LONG(0))

        def of_tail(size: Any) -> Any:
            return builder.select(has_tail, size, LONG(0))

        line, lines = LONG(_LINE_BYTES), LONG(AMX_ROWS)
        shapes = dict.fromkeys((0, 1, _LEFT), (rows, line)) | dict.fromkeys(_RIGHTS, (lines, line))
        shapes[_LEFT_TAIL] = of_tail(rows), builder.mul(tail, LONG(2))
        shapes |= dict.fromkeys(_RIGHT_TAILS, (builder.udiv(tail, LONG(2)), of_tail(line)))
        content = ir.Constant(ir.ArrayType(_BYTE, 64), [1] + [0] * 63)  # palette 1, first row 0
        place = alloca_once(builder, content.type)
        builder.store(content, place)
        start = builder.bitcast(place, _BYTE.as_pointer())
        for tile, (height, width) in shapes.items():
            builder.store(builder.trunc(width, _BYTE), builder.gep(start, [LONG(16 + 2 * tile)]))
            builder.store(builder.trunc(height, _BYTE), builder.gep(start, [LONG(48 + tile)]))
        self._call("ldtilecfg", start)

    def sum_blocks(
        self, left_at: Any, left_stride: Any, right: int, first: Any, steps: Any, num_blocks: int, sums: int,
        *, has_tail: bool,
    ) -> None:  # fmt: skip
        """Products of rows of array 0 with one or two blocks of columns, to ``sums``.

        Args:
            left_at: First factor of the first row.
            left_stride: Elements from row to row.
            right: The matrix.
            first: First element of the first block.
            steps: Steps of a block.
            num_blocks: 1 or 2.
            sums: Buffer of ``SUMS``.
            has_tail: Whether steps that fill no register are multiplied too; ``_LEFT_TAIL`` holds the rows' factors.
        """
        builder, block_size = self.builder, self.builder.mul(steps, LONG(LANES))
        tail = builder.srem(steps, LONG(BF16_LANES))
        whole = builder.sub(steps, tail)
        starts = [builder.add(first, builder.mul(LONG(tile), block_size)) for tile in range(num_blocks)]
        for tile in range(num_blocks):
            self.clear_tile(tile)
        with for_range_slice(builder, LONG(0), whole, LONG(BF16_LANES)) as (at, _):
            self.load_tile(_LEFT, 0, builder.add(left_at, at), left_stride)
            line = builder.mul(at, LONG(LANES))
            for tile, start in enumerate(starts):
                self._load_block(_RIGHTS[tile], right, builder.add(start, line), AMX_ROWS)
                self.multiply_add_tiles(tile, _LEFT, _RIGHTS[tile])
        if has_tail:
            with builder.if_then(builder.icmp_signed("!=", tail, LONG(0))):
                line = builder.mul(whole, LONG(LANES))
                for tile, start in enumerate(starts):
                    self._load_block(_RIGHT_TAILS[tile], right, builder.add(start, line), AMX_ROWS // 2)
                    self.multiply_add_tiles(tile, _LEFT_TAIL, _RIGHT_TAILS[tile])
        for tile in range(num_blocks):
            self.store_tile(tile, sums, LONG(LANES * tile), LONG(2 * LANES))

    def _load_block(self, tile: int, right: int, at: Any, num_lines: int) -> None:
        """Load lines of a block of columns, and fetch as many that follow later."""
        self.load_tile(tile, right, at, LONG(2 * LANES))
        for line in range(num_lines):
            self.fetch(right, self.builder.add(at, LONG(AHEAD + 2 * LANES * line)))

    def by_blocks(self, blocks: Any, emit: Any) -> None:
        """Emit code for all blocks: two at once, then the last one."""
        whole = self.builder.and_(blocks, LONG(-2))
        for start, stop, num_blocks in ((LONG(0), whole, 2), (whole, blocks, 1)):
            with for_range_slice(self.builder, start, stop, LONG(num_blocks)) as (block, _):
                emit(block, num_blocks)


@_intrinsic
def shape_products(_context, rows, tail):  # type: ignore[no-untyped-def]
    """Prepare the tile registers of this thread for products; ``release_tiles`` undoes it.

    Args:
        rows: int64, 1 to ``AMX_ROWS``: rows that are multiplied together.
        tail: int64, the remainder of the rank of the next ``add_products`` by 32; even.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        _ProductCode(context, builder, signature.args, arguments).shape_tiles(*arguments)
        return context.get_dummy_value()

    return types.void(rows, tail), generate


@_intrinsic
def scaled_products(  # type: ignore[no-untyped-def]
    _context, left, left_at, left_stride, right, steps, blocks, scales, out, out_stride, rows, sums
):
    """Multiply some rows by a matrix, scale the sums of each column, and round them.

    Args:
        left: bfloat16 viewed as uint16, as ``right``; all arrays are C-contiguous and indexed as flat.
        left_at: int64, as all other scalars: the first element of the first row.
        left_stride: Elements from row to row.
        right: The matrix, in blocks of sixteen columns.
        steps: Elements of each row, a multiple of 32.
        blocks: Blocks of columns.
        scales: float32, of each column.
        out: bfloat16 viewed as uint16; the results of row r start at ``r * out_stride``.
        out_stride: Elements from row to row.
        rows: Rows, as for ``shape_products``.
        sums: [SUMS] float32, a buffer.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = _ProductCode(context, builder, signature.args, arguments)
        left_at, left_stride, steps, blocks, out_stride, rows = (arguments[index] for index in (1, 2, 4, 5, 8, 9))

        def emit(block: Any, num_blocks: int) -> None:
            first = builder.mul(block, builder.mul(steps, LONG(LANES)))
            code.sum_blocks(left_at, left_stride, 3, first, steps, num_blocks, 10, has_tail=False)
            column = builder.mul(block, LONG(LANES))
            factors = [code.load(6, builder.add(column, LONG(LANES * tile))) for tile in range(num_blocks)]
            with for_range_slice(builder, LONG(0), rows, LONG(1)) as (row, _):
                target = builder.add(builder.mul(row, out_stride), column)
                for tile, factor in enumerate(factors):
                    total = code.load(10, builder.add(builder.mul(row, LONG(2 * LANES)), LONG(LANES * tile)))
                    code.store_weights(code.multiply(total, factor), 7, builder.add(target, LONG(LANES * tile)))

        code.by_blocks(blocks, emit)
        return context.get_dummy_value()

    kinds = (left, left_at, left_stride, right, steps, blocks, scales, out, out_stride, rows, sums)
    return types.void(*kinds), generate


@_intrinsic
def add_products(  # type: ignore[no-untyped-def]
    _context, left, left_at, left_stride, right, steps, blocks, out, out_starts, rows, sums
):
    """Add the products of some rows with a matrix to rows of ``out``, rounded.

    Args:
        left: As for ``scaled_products``, as all arguments that are not listed.
        steps: Elements of each row, even; ``shape_products`` has got the remainder.
        out: bfloat16 viewed as uint16.
        out_starts: int64, the first element of each row in ``out``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = _ProductCode(context, builder, signature.args, arguments)
        left_at, left_stride, steps, blocks, rows = (arguments[index] for index in (1, 2, 4, 5, 8))
        tail = builder.srem(steps, LONG(BF16_LANES))
        with builder.if_then(builder.icmp_signed("!=", tail, LONG(0))):
            code.load_tile(_LEFT_TAIL, 0, builder.add(left_at, builder.sub(steps, tail)), left_stride)

        def emit(block: Any, num_blocks: int) -> None:
            first = builder.mul(block, builder.mul(steps, LONG(LANES)))
            code.sum_blocks(left_at, left_stride, 3, first, steps, num_blocks, 9, has_tail=True)
            column = builder.mul(block, LONG(LANES))
            with for_range_slice(builder, LONG(0), rows, LONG(1)) as (row, _):
                start = builder.load(code.pointer(7, row, ir.IntType(64), LONG))
                for tile in range(num_blocks):
                    place = builder.add(start, builder.add(column, LONG(LANES * tile)))
                    total = code.load(9, builder.add(builder.mul(row, LONG(2 * LANES)), LONG(LANES * tile)))
                    code.store_weights(code.add(code.load(6, place), total), 6, place)

        code.by_blocks(blocks, emit)
        return context.get_dummy_value()

    return types.void(left, left_at, left_stride, right, steps, blocks, out, out_starts, rows, sums), generate
