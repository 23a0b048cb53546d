"""LLVM vector code that Numba does not generate from loops.

Most functions process sixteen positions of keys or values at arbitrary slots. LLVM splits vectors that are wider than
the processor's registers and fuses products with sums where the processor can, so the code is the same on every
processor. bfloat16 is the upper half of a float32, so a shift converts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once_value, for_range_slice, get_or_insert_function
from numba.extending import intrinsic

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

LANES = 16
"""Elements of a vector, and positions per call."""
LINE_BYTES = 64
"""Size of a line of the processor's cache, on x86 and nearly all other processors."""

FLOAT, SHORT, INT, LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
VECTOR, SHORTS, INTS = (ir.VectorType(kind, LANES) for kind in (FLOAT, SHORT, INT))
ZERO = ir.Constant(VECTOR, [0.0] * LANES)
_FREE_ORDER = ("reassoc", "contract", "nsz")


def _every_other(first: int, *, of_rows: bool) -> ir.Constant:
    """A shuffle mask over two vectors, each a 4 x 4 matrix: every other element or row, starting with ``first``.

    By elements, each row of the result has two elements of the first vector's row, then two of the second's.
    """
    if of_rows:
        indices = [row * 4 + column for row in (first, first + 2, first + 4, first + 6) for column in range(4)]
    else:
        indices = [row * 4 + which * LANES + first + step for row in range(4) for which in (0, 1) for step in (0, 2)]
    return ir.Constant(INTS, indices)


@_intrinsic
def score_positions(  # type: ignore[no-untyped-def]
    _context, query, query_at, keys, slots, slots_at, stride, base, width, scores, scores_at
):
    """Dot products of one query with the keys of sixteen positions.

    ``scores[scores_at + p]`` becomes the dot product of ``query[query_at:][:width]`` and ``keys[key_at:][:width]``,
    where ``key_at = slots[slots_at + p] * stride + base``. All arrays are C-contiguous and indexed as flat.

    Args:
        query: float32.
        query_at: int64, like all other scalars.
        keys: float32, or bfloat16 viewed as uint16.
        slots: int32.
        slots_at: Index of the first of sixteen slots.
        stride: Elements from slot to slot.
        base: First element of the head in a slot.
        width: A multiple of sixteen; the caller computes the rest of a head.
        scores: float32.
        scores_at: Index of the first of sixteen scores.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        starts = code.starts(slots=3, slots_at=4, stride=5, base=6)
        code.store(code.products(0, arguments[1], 2, starts, width=7), 8, arguments[9])
        return context.get_dummy_value()

    arguments = (query, query_at, keys, slots, slots_at, stride, base, width, scores, scores_at)
    return types.void(*arguments), generate


@_intrinsic
def add_positions(  # type: ignore[no-untyped-def]
    _context, weights, weights_at, values, slots, slots_at, stride, base, width, out, out_at
):
    """Add the values of sixteen positions, weighted, to ``out[out_at:][:width]``.

    Adds the sum over p of ``weights[weights_at + p] * values[value_at:][:width]``, where
    ``value_at = slots[slots_at + p] * stride + base``. The other arguments are those of ``score_positions``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        starts = code.starts(slots=3, slots_at=4, stride=5, base=6)
        shares = [code.splat(0, builder.add(arguments[1], LONG(position))) for position in range(LANES)]
        with code.steps(width=7) as at:
            place = builder.add(arguments[9], at)
            # Four independent sums: with one, each product would wait for the one before it.
            sums = [code.load(8, place), ZERO, ZERO, ZERO]
            for position, (start, share) in enumerate(zip(starts, shares, strict=True)):
                value = code.load(2, builder.add(start, at))
                sums[position % 4] = code.multiply_add(share, value, sums[position % 4])
            code.store(code.add(code.add(sums[0], sums[1]), code.add(sums[2], sums[3])), 8, place)
        return context.get_dummy_value()

    arguments = (weights, weights_at, values, slots, slots_at, stride, base, width, out, out_at)
    return types.void(*arguments), generate


@_intrinsic
def widen_positions(  # type: ignore[no-untyped-def]
    _context, array, slots, slots_at, stride, base, width, wide, wide_at, wide_stride
):
    """Copy one head's keys or values of sixteen positions as float32, one after another.

    ``wide[wide_at + p * wide_stride:][:width]`` becomes ``array[start:][:width]``, where ``start`` is
    ``slots[slots_at + p] * stride + base``. The other arguments are those of ``score_positions``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        for position, start in enumerate(code.starts(slots=1, slots_at=2, stride=3, base=4)):
            first = builder.add(arguments[7], builder.mul(LONG(position), arguments[8]))
            with code.steps(width=5) as at:
                code.store(code.load(0, builder.add(start, at)), 6, builder.add(first, at))
        return context.get_dummy_value()

    return types.void(array, slots, slots_at, stride, base, width, wide, wide_at, wide_stride), generate


@_intrinsic
def rotate_halves(_context, rows, at, half, width, cos, sin):  # type: ignore[no-untyped-def]
    """Apply rotary positions to a head in place; element d is paired with element ``half + d``.

    The head ``x`` becomes ``x * cos + concatenate(-x[half:], x[:half]) * sin``.

    Args:
        rows: float32, like all other arrays; C-contiguous and indexed as flat.
        at: int64, first element of the head.
        half: int64, elements of half a head.
        width: int64, a multiple of sixteen; the caller rotates the rest of each half.
        cos: [2 * half].
        sin: [2 * half].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        with code.steps(width=3) as step:
            further = builder.add(step, arguments[2])
            places = [builder.add(arguments[1], index) for index in (step, further)]
            low, high = (code.load(0, place) for place in places)
            rotated = code.subtract(code.multiply(low, code.load(4, step)), code.multiply(high, code.load(5, step)))
            code.store(rotated, 0, places[0])
            rotated = code.multiply_add(low, code.load(5, further), code.multiply(high, code.load(4, further)))
            code.store(rotated, 0, places[1])
        return context.get_dummy_value()

    return types.void(rows, at, half, width, cos, sin), generate


@_intrinsic
def fetch_positions(_context, array, slots, slots_at, stride, base, width):  # type: ignore[no-untyped-def]
    """Prefetch one head's keys or values of sixteen positions; the arguments are those of ``score_positions``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        per_line = LINE_BYTES // (signature.args[0].dtype.bitwidth // 8)
        for start in code.starts(slots=1, slots_at=2, stride=3, base=4):
            with code.steps(width=5, step=per_line) as at:
                code.fetch(0, builder.add(start, at))
        return context.get_dummy_value()

    return types.void(array, slots, slots_at, stride, base, width), generate


class Code:
    """Emits the code of one call; arguments are named by position."""

    step = LANES
    """Elements per ``multiply_add``."""

    def __init__(self, context: Any, builder: Any, kinds: Sequence[Any], arguments: Sequence[Any]) -> None:
        self.builder = builder
        self._arguments = arguments
        self._arrays = {
            index: context.make_array(kind)(context, builder, arguments[index]).data
            for index, kind in enumerate(kinds)
            if isinstance(kind, types.Array)
        }
        self._is_short = {index for index in self._arrays if kinds[index].dtype == types.uint16}

    def starts(self, *, slots: int, slots_at: int, stride: int, base: int) -> list[Any]:
        """The first element of each of the sixteen positions."""
        builder, starts = self.builder, []
        for position in range(LANES):
            at = builder.add(self._arguments[slots_at], LONG(position))
            slot = builder.sext(builder.load(self.pointer(slots, at, INT, INT)), LONG)
            starts.append(builder.add(builder.mul(slot, self._arguments[stride]), self._arguments[base]))
        return starts

    def products(self, query: int, query_at: Any, keys: int, starts: Sequence[Any], *, width: int) -> Any:
        """Dot products [16] of the query at one element with the keys at sixteen elements."""
        builder = self.builder
        sums = [alloca_once_value(builder, ZERO) for _ in starts]
        with self.steps(width=width, step=self.step) as at:
            own = self.factors(query, builder.add(query_at, at))
            for start, total in zip(starts, sums, strict=True):
                key = self.factors(keys, builder.add(start, at))
                builder.store(self.multiply_add(own, key, builder.load(total)), total)
        return self.sum_each([builder.load(total) for total in sums])

    @contextmanager
    def steps(self, *, width: int, step: int = LANES) -> Iterator[Any]:
        """A loop over vectors of ``step`` elements; yields the first element of each."""
        with for_range_slice(self.builder, LONG(0), self._arguments[width], LONG(step)) as (at, _):
            yield at

    def fetch(self, array: int, at: Any) -> None:
        """Prefetch the cache line of one element into the L2 cache, for reading."""
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, INT, INT, INT])
        prefetch = get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        pointer = self.pointer(array, at, SHORT if array in self._is_short else FLOAT, ir.IntType(8))
        self.builder.call(prefetch, [pointer, INT(0), INT(2), INT(1)])

    def load(self, array: int, at: Any) -> Any:
        """Sixteen elements as float32."""
        builder = self.builder
        if array not in self._is_short:
            return builder.load(self.pointer(array, at, FLOAT, VECTOR), align=4)
        halves = builder.load(self.pointer(array, at, SHORT, SHORTS), align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, INTS), ir.Constant(INTS, [16] * LANES)), VECTOR)

    def factors(self, array: int, at: Any) -> Any:
        """Elements in the form that ``multiply_add`` takes."""
        return self.load(array, at)

    def repeated_factor(self, array: int, at: Any) -> Any:
        """One factor, repeated in the form that ``multiply_add`` takes."""
        return self.splat(array, at)

    def store(self, vector: Any, array: int, at: Any) -> None:
        """Write sixteen elements of a float32 array."""
        self.builder.store(vector, self.pointer(array, at, FLOAT, VECTOR), align=4)

    def splat(self, array: int, at: Any) -> Any:
        """One element of a float32 array, repeated sixteen times."""
        return self.repeat(self.builder.load(self.pointer(array, at, FLOAT, FLOAT)))

    def repeat(self, one: Any) -> Any:
        """A number of four bytes, repeated sixteen times."""
        none = ir.Constant(ir.VectorType(one.type, LANES), ir.Undefined)
        first = self.builder.insert_element(none, one, INT(0))
        return self.builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))

    def add(self, left: Any, right: Any) -> Any:
        """Element by element."""
        return self.builder.fadd(left, right, flags=_FREE_ORDER)

    def subtract(self, left: Any, right: Any) -> Any:
        """Element by element."""
        return self.builder.fsub(left, right, flags=_FREE_ORDER)

    def multiply(self, left: Any, right: Any) -> Any:
        """Element by element."""
        return self.builder.fmul(left, right, flags=_FREE_ORDER)

    def multiply_add(self, left: Any, right: Any, addend: Any) -> Any:
        """``left * right + addend``, fused if the processor can."""
        return self.add(self.multiply(left, right), addend)

    def sum_each(self, vectors: list[Any]) -> Any:
        """The sums of sixteen vectors, in one vector.

        Halves the number of vectors four times. The first two rounds move elements within rows of four, which is
        cheap; the last two move rows.
        """
        for of_rows in (False, False, True, True):
            even, odd = _every_other(0, of_rows=of_rows), _every_other(1, of_rows=of_rows)
            vectors = [
                self.add(
                    self.builder.shuffle_vector(first, second, even),
                    self.builder.shuffle_vector(first, second, odd),
                )
                for first, second in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def pointer(self, array: int, at: Any, element: Any, target: Any) -> Any:
        """A pointer of type ``target`` to element ``at`` of an array of type ``element``."""
        data = self.builder.bitcast(self._arrays[array], element.as_pointer())
        return self.builder.bitcast(self.builder.gep(data, [at]), target.as_pointer())
