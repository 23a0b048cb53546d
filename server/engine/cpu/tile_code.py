"""LLVM vector code for attention in tiles: packing, products of small matrices, and the online softmax.

The elements that are multiplied are called factors. On processors with VDPBF16PS, factors of bfloat16 stay bfloat16,
and adjacent elements are multiplied in pairs; everywhere else factors are float32. Sums are float32. LLVM splits
vectors that are wider than the processor's registers, so only the number of sums in registers depends on the
processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.core.cgutils import alloca_once_value, for_range_slice, get_or_insert_function
from numba.extending import intrinsic

from server.engine.cpu.amx_code import AMX_ROWS, has_amx
from server.engine.cpu.bf16_dot import BFloat, BFloat16Code
from server.engine.cpu.vector_code import FLOAT, INT, INTS, LANES, LONG, SHORT, VECTOR, ZERO, Code

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

TILE_KEYS = 128
"""Keys of one tile."""

TILE_ROWS = 6
"""Query rows of one product. With four vectors of sums each, they leave enough of 32 registers for the factors."""

_HAS_WIDE_REGISTERS = bool(binding.get_host_cpu_features().get("avx512f", False))

TILE_VECTORS = 4 if _HAS_WIDE_REGISTERS else 1
"""Vectors of sums of each row of one product."""

_SOFTMAX_ROWS = 8
"""Rows whose weights are computed together: their sums and largest scores take half of 32 registers."""

_BFLOATS, _BOOLS = ir.VectorType(BFloat(), LANES), ir.VectorType(ir.IntType(1), LANES)


def _constant(number: float) -> ir.Constant:
    return ir.Constant(VECTOR, [number] * LANES)


# exp2's smallest normal result. Anything less is 0.0, so that hidden keys have no weight.
_LEAST = _constant(-126.0)
_MINUS_INFINITY = _constant(float("-inf"))
# Taylor coefficients of 2**x around 0, ln(2)**k / k!: below 2e-7 relative on [-1/2, 1/2].
_EXP2 = [math.log(2) ** power / math.factorial(power) for power in range(6, -1, -1)]


def has_tile_registers(factors: Any) -> bool:
    """Whether factors of a Numba array type are multiplied by AMX."""
    return factors.dtype == types.uint16 and has_amx()


def rows_of_tile(factors: Any) -> int:
    """Query rows of one product, by the Numba array type of the factors."""
    return AMX_ROWS if has_tile_registers(factors) else TILE_ROWS


class TileCode(Code):
    """Code of the softmax."""

    def exp2(self, x: Any) -> Any:
        """Two to the power of sixteen numbers that are at most 0, or NaN, which stays NaN."""
        builder = self.builder
        nearest = get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR]), "llvm.rint.v16f32")
        power = builder.call(nearest, [x])
        rest = self.subtract(x, power)
        y = _constant(_EXP2[0])
        for factor in _EXP2[1:]:
            y = self.multiply_add(y, rest, _constant(factor))
        # Adds to the exponent of y, which is about 1.
        shift = builder.shl(builder.fptosi(power, INTS), ir.Constant(INTS, [23] * LANES))
        scaled = builder.bitcast(builder.add(builder.bitcast(y, INTS), shift), VECTOR)
        return builder.select(builder.fcmp_ordered("<", x, _LEAST), ZERO, scaled)

    def largest(self, left: Any, right: Any) -> Any:
        """Element by element; ``right`` if ``left`` is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", left, right), left, right)

    def across(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Combine the sixteen elements of a vector; every element of the result holds it."""
        for step in (8, 4, 2, 1):
            order = ir.Constant(INTS, [lane ^ step for lane in range(LANES)])
            vector = combine(vector, self.builder.shuffle_vector(vector, vector, order))
        return vector

    def store_weights(self, weights: Any, array: int, at: Any) -> None:
        """Write sixteen factors: rounded to bfloat16, or float32."""
        if array not in self._is_short:
            self.store(weights, array, at)
            return
        kind = ir.FunctionType(_BFLOATS, [VECTOR])
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        rounded = self.builder.call(get_or_insert_function(self.builder.module, kind, name), [weights])
        shorts = self.builder.bitcast(rounded, ir.VectorType(SHORT, LANES))
        self.builder.store(shorts, self.pointer(array, at, SHORT, ir.VectorType(SHORT, LANES)), align=2)


@_intrinsic
def transpose_keys(_context, keys, slots, slots_at, stride, base, width, packed, packed_at):  # type: ignore[no-untyped-def]
    """Pack one head's keys of sixteen positions, so that a vector holds an element, or pair, of sixteen keys.

    ``packed`` is the ``right`` of ``multiply_tile``, a column for each key. The other arguments are those of
    ``vector_code.score_positions``.

    Args:
        packed: float32; or bfloat16 viewed as uint16, as the keys are, for pairs of adjacent elements.
        width: A multiple of 16, or of 32 for pairs; the caller packs the rest of a head.
        packed_at: int64, the first element of the first key in ``packed``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        is_pair = signature.args[6].dtype == types.uint16
        size = 2 if is_pair else 1
        starts = code.starts(slots=1, slots_at=2, stride=3, base=4)
        with code.steps(width=5, step=size * LANES) as at:
            if is_pair:
                places = [code.pointer(0, builder.add(start, at), SHORT, INTS) for start in starts]
                vectors = [builder.load(place, align=2) for place in places]
            else:
                vectors = [builder.bitcast(code.load(0, builder.add(start, at)), INTS) for start in starts]
            for lane, vector in enumerate(_transposed(builder, vectors)):
                row = builder.mul(builder.add(at, LONG(size * lane)), LONG(TILE_KEYS))
                target = code.pointer(6, builder.add(arguments[7], row), SHORT if is_pair else FLOAT, INTS)
                builder.store(vector, target, align=2 * size if is_pair else 4)
        return context.get_dummy_value()

    return types.void(keys, slots, slots_at, stride, base, width, packed, packed_at), generate


def _transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """Transpose a matrix of sixteen vectors by exchanging halves, quarters, eighths and single elements."""
    for step in (8, 4, 2, 1):
        lower = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        upper = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        masks = [ir.Constant(INTS, order) for order in (lower, upper)]
        following = list(vectors)
        for index in range(LANES):
            if not index & step:
                pair = vectors[index], vectors[index + step]
                following[index], following[index + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        vectors = following
    return vectors


def _emit_product(code: Code, arguments: Sequence[Any], vectors: int, *, adds: bool) -> None:
    """The code of ``multiply_tile``, or ``add_tile``, for a number of vectors of columns."""
    builder, size = code.builder, code.step // LANES
    left_at, left_stride, right_at, right_stride, out_at, out_stride = (
        arguments[index] for index in (1, 2, 4, 5, 8, 9)
    )
    places = [
        [
            builder.add(builder.add(out_at, builder.mul(LONG(row), out_stride)), LONG(LANES * column))
            for column in range(vectors)
        ]
        for row in range(TILE_ROWS)
    ]
    sums = []
    for row, own in enumerate(places):
        firsts = [ZERO] * vectors
        if adds:
            scale = code.splat(10, builder.add(arguments[11], LONG(row)))
            firsts = [code.multiply(scale, code.load(7, place)) for place in own]
        sums.append([alloca_once_value(builder, first) for first in firsts])
    with code.steps(width=6, step=size) as at:
        line = builder.add(right_at, builder.mul(at, right_stride))
        rights = [code.factors(3, builder.add(line, LONG(size * LANES * column))) for column in range(vectors)]
        for row, totals in enumerate(sums):
            factor = code.repeated_factor(
                0, builder.add(builder.add(left_at, builder.mul(LONG(row), left_stride)), at)
            )
            for right, total in zip(rights, totals, strict=True):
                builder.store(code.multiply_add(factor, right, builder.load(total)), total)
    for own, totals in zip(places, sums, strict=True):
        for place, total in zip(own, totals, strict=True):
            code.store(builder.load(total), 7, place)


def _product_code(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Code:
    kind = BFloat16Code if signature.args[0].dtype == types.uint16 else Code
    return kind(context, builder, signature.args, arguments)


@_intrinsic
def multiply_tile(  # type: ignore[no-untyped-def]
    _context, left, left_at, left_stride, right, right_at, right_stride, steps, out, out_at, out_stride
):
    """Multiply ``TILE_ROWS`` rows of factors by a matrix of ``TILE_VECTORS`` vectors of columns.

    ``out[out_at + row * out_stride + column]`` becomes the sum over k of ``left[left_at + row * left_stride + k]``
    times the factor of row k and ``column`` of ``right``. In bfloat16, two rows of ``right`` are interleaved: the
    factor is at ``right_at + (k - k % 2) * right_stride + 2 * column + k % 2``.

    Args:
        left: float32, or bfloat16 viewed as uint16, as ``right``; all arrays are C-contiguous and indexed as flat.
        left_at: int64, as all other scalars.
        left_stride: Elements from row to row.
        right: The matrix.
        right_at: Its first element.
        right_stride: Columns of the matrix.
        steps: Factors of each sum; even for bfloat16.
        out: float32.
        out_at: First sum.
        out_stride: Elements from row to row.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = _product_code(context, builder, signature, arguments)
        _emit_product(code, arguments, TILE_VECTORS, adds=False)
        return context.get_dummy_value()

    kinds = (left, left_at, left_stride, right, right_at, right_stride, steps, out, out_at, out_stride)
    return types.void(*kinds), generate


def _add_tile(vectors: int) -> Any:
    @_intrinsic
    def add_tile(  # type: ignore[no-untyped-def]
        _context, left, left_at, left_stride, right, right_at, right_stride, steps, out, out_at, out_stride, scales,
        scales_at,
    ):  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            code = _product_code(context, builder, signature, arguments)
            _emit_product(code, arguments, vectors, adds=True)
            return context.get_dummy_value()

        kinds = (left, left_at, left_stride, right, right_at, right_stride, steps, out, out_at, out_stride)
        return types.void(*kinds, scales, scales_at), generate

    return add_tile


add_tile = _add_tile(TILE_VECTORS)
"""``multiply_tile``, added to ``out`` after row r of it is multiplied by the float32 ``scales[scales_at + r]``."""

add_narrow_tile = _add_tile(1)
"""``add_tile`` for one vector of columns."""


@_intrinsic
def softmax_tile(  # type: ignore[no-untyped-def]
    _context, scores, num_whole, num_keys, lows, highs, scale, row, largest, sums, scales, weights
):
    """Continue the softmax of some rows with the scores of one tile. Exponentials are powers of two.

    The number of rows, R, is ``rows_of_tile`` of the weights.

    Args:
        scores: [R, TILE_KEYS] float32.
        num_whole: int64, a multiple of 16: the number of the tile's first keys that all rows see.
        num_keys: int64, a multiple of 16: the number of the tile's keys that some row sees.
        lows: [R] int32. Of the keys from ``num_whole`` on, each row sees those from its low on.
        highs: [R] int32. It sees those before its high. Both may be outside of the tile.
        scale: float32 factor of the scores, times log2(e).
        row: int64, the first row in ``largest`` and ``sums``.
        largest: [rows + 16] float32, the largest scaled score up to now; updated. -inf before the first tile.
        sums: [rows, 16] float32, partial sums of the weights; updated.
        scales: [16] float32; the factors of what the rows have summed before; overwritten.
        weights: [R, TILE_KEYS] factors; the exponentials of the scores minus the largest; overwritten.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = TileCode(context, builder, signature.args, arguments)
        num_rows = rows_of_tile(signature.args[10])
        num_whole, num_keys, row = arguments[1], arguments[2], arguments[6]
        scale = code.repeat(arguments[5])
        keys = ir.Constant(INTS, list(range(LANES)))

        def load(number: int, at: Any, *, is_masked: bool) -> Any:
            score = code.load(0, builder.add(at, LONG(number * TILE_KEYS)))
            if not is_masked:
                return score
            key = builder.add(code.repeat(builder.trunc(at, INT)), keys)
            low, high = (code.repeat(builder.load(code.pointer(index, LONG(number), INT, INT))) for index in (3, 4))
            is_seen = builder.and_(builder.icmp_signed(">=", key, low), builder.icmp_signed("<", key, high))
            return builder.select(is_seen, score, _MINUS_INFINITY)

        parts = (LONG(0), num_whole, False), (num_whole, num_keys, True)
        maxima = [alloca_once_value(builder, _MINUS_INFINITY) for _ in range(num_rows)]
        for start, stop, is_masked in parts:
            with for_range_slice(builder, start, stop, LONG(LANES)) as (at, _):
                for number, most in enumerate(maxima):
                    score = load(number, at, is_masked=is_masked)
                    builder.store(code.largest(score, builder.load(most)), most)
        before = code.load(7, row)
        after = before
        for number, most in enumerate(maxima):
            one = code.multiply(code.across(builder.load(most), code.largest), scale)
            is_row = ir.Constant(_BOOLS, [lane == number for lane in range(LANES)])
            after = builder.select(is_row, code.largest(one, before), after)
        code.store(after, 7, row)
        # A row that has seen no key yet has no largest score; -inf minus -inf is NaN.
        after = builder.select(builder.fcmp_ordered("==", after, _MINUS_INFINITY), ZERO, after)
        code.store(code.exp2(code.subtract(before, after)), 9, LONG(0))
        for first in range(0, num_rows, _SOFTMAX_ROWS):
            rows = range(first, min(first + _SOFTMAX_ROWS, num_rows))
            bounds, totals, places = [], [], []
            for number in rows:
                bounds.append(builder.shuffle_vector(after, after, ir.Constant(INTS, [number] * LANES)))
                places.append(builder.mul(builder.add(row, LONG(number)), LONG(LANES)))
                total = code.multiply(code.load(8, places[-1]), code.splat(9, LONG(number)))
                totals.append(alloca_once_value(builder, total))
            for start, stop, is_masked in parts:
                with for_range_slice(builder, start, stop, LONG(LANES)) as (at, _):
                    for number, bound, total in zip(rows, bounds, totals, strict=True):
                        score = code.multiply(load(number, at, is_masked=is_masked), scale)
                        weight = code.exp2(code.subtract(score, bound))
                        builder.store(code.add(builder.load(total), weight), total)
                        code.store_weights(weight, 10, builder.add(at, LONG(number * TILE_KEYS)))
            for place, total in zip(places, totals, strict=True):
                code.store(builder.load(total), 8, place)
        return context.get_dummy_value()

    kinds = (scores, num_whole, num_keys, lows, highs, scale, row, largest, sums, scales, weights)
    return types.void(*kinds), generate
