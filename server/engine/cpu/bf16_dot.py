"""LLVM code for dot products of bfloat16 by VDPBF16PS, on processors with AVX512_BF16.

VDPBF16PS multiplies 32 bfloat16 elements by 32 others and adds the products of adjacent elements to 16 float32 sums.
Nothing is converted to float32 first. Products are exact; the order of the sums differs, and denormals count as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import config, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine.cpu.vector_code import INT, LANES, LONG, SHORT, VECTOR, ZERO, Code

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

BF16_LANES = 2 * LANES
"""Elements that one instruction multiplies. The head width has to be a multiple of it."""


class BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's type bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_SHORTS, _BFLOATS = ir.VectorType(SHORT, BF16_LANES), ir.VectorType(BFloat(), BF16_LANES)
_LOW, _HIGH = (
    ir.Constant(
        ir.VectorType(INT, BF16_LANES),
        [which * BF16_LANES + first + lane for lane in range(LANES) for which in (0, 1)],
    )
    for first in (0, LANES)
)


@cache
def has_bf16_dot() -> bool:
    """Whether the processor that kernels are compiled for has VDPBF16PS.

    False where ``NUMBA_CPU_NAME`` or ``NUMBA_CPU_FEATURES`` names another target than this processor.
    """
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # type: ignore[attr-defined]
        return False
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


@_intrinsic
def score_positions_bf16(  # type: ignore[no-untyped-def]
    _context, query, query_at, scale, keys, slots, slots_at, stride, base, width, scores, scores_at
):
    """``score_positions`` for bfloat16 queries and keys; arguments that are not listed are the same.

    Args:
        query: bfloat16 viewed as uint16.
        scale: float32 factor of the products.
        keys: bfloat16 viewed as uint16.
        width: A multiple of ``BF16_LANES``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = BFloat16Code(context, builder, signature.args, arguments)
        starts = code.starts(slots=4, slots_at=5, stride=6, base=7)
        products = code.products(0, arguments[1], 3, starts, width=8)
        code.store(code.multiply(products, code.repeat(arguments[2])), 9, arguments[10])
        return context.get_dummy_value()

    arguments = (query, query_at, scale, keys, slots, slots_at, stride, base, width, scores, scores_at)
    return types.void(*arguments), generate


@_intrinsic
def interleave_positions(  # type: ignore[no-untyped-def]
    _context, array, slots, slots_at, stride, base, width, out, out_at, out_stride
):
    """Copy one head's values of sixteen positions, with the elements of adjacent positions interleaved.

    ``out[out_at + 2 * p * out_stride:][:2 * width]`` becomes the values of positions ``2 * p`` and ``2 * p + 1``:
    element 0 of both, element 1 of both, and so on. The other arguments are those of ``score_positions_bf16``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        starts = code.starts(slots=1, slots_at=2, stride=3, base=4)
        with code.steps(width=5, step=BF16_LANES) as at:
            for pair in range(LANES // 2):
                even, odd = (
                    builder.load(code.pointer(0, builder.add(start, at), SHORT, _SHORTS), align=2)
                    for start in starts[2 * pair : 2 * pair + 2]
                )
                row = builder.add(arguments[7], builder.mul(LONG(2 * pair), arguments[8]))
                place = builder.add(row, builder.mul(LONG(2), at))
                for further, order in ((0, _LOW), (BF16_LANES, _HIGH)):
                    target = code.pointer(6, builder.add(place, LONG(further)), SHORT, _SHORTS)
                    builder.store(builder.shuffle_vector(even, odd, order), target, align=2)
        return context.get_dummy_value()

    return types.void(array, slots, slots_at, stride, base, width, out, out_at, out_stride), generate


@_intrinsic
def add_positions_bf16(_context, weights, weights_at, values, width, out, out_at):  # type: ignore[no-untyped-def]
    """Add the values of sixteen positions, weighted, to ``out[out_at:][:width]``.

    Args:
        weights: bfloat16 viewed as uint16; the sixteen weights start at ``weights_at``.
        weights_at: int64, like the other scalars.
        values: The output of ``interleave_positions``.
        width: A multiple of ``BF16_LANES``.
        out: float32.
        out_at: First element of the sums.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = BFloat16Code(context, builder, signature.args, arguments)
        pairs = range(0, LANES, 2)
        shares = [code.repeated_factor(0, builder.add(arguments[1], LONG(first))) for first in pairs]
        with code.steps(width=3) as at:
            place = builder.add(arguments[5], at)
            # Two independent sums: with one, each product would wait for the one before it.
            sums = [code.load(4, place), ZERO]
            for pair, share in enumerate(shares):
                first = builder.mul(LONG(2), builder.add(builder.mul(LONG(pair), arguments[3]), at))
                sums[pair % 2] = code.multiply_add(share, code.factors(2, first), sums[pair % 2])
            code.store(code.add(*sums), 4, place)
        return context.get_dummy_value()

    return types.void(weights, weights_at, values, width, out, out_at), generate


class BFloat16Code(Code):
    """Code whose products are VDPBF16PS, 32 elements at a time."""

    step = BF16_LANES

    def factors(self, array: int, at: Any) -> Any:
        """32 bfloat16 elements."""
        shorts = self.builder.load(self.pointer(array, at, SHORT, _SHORTS), align=2)
        return self.builder.bitcast(shorts, _BFLOATS)

    def repeated_factor(self, array: int, at: Any) -> Any:
        """Two adjacent bfloat16 elements, repeated sixteen times."""
        pair = self.builder.load(self.pointer(array, at, SHORT, INT), align=2)
        return self.builder.bitcast(self.repeat(pair), _BFLOATS)

    def multiply_add(self, left: Any, right: Any, addend: Any) -> Any:
        """``addend`` [16] plus the sums of adjacent products of ``left`` and ``right`` [32]."""
        kind = ir.FunctionType(VECTOR, [VECTOR, _BFLOATS, _BFLOATS])
        instruction = get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return self.builder.call(instruction, [addend, left, right])
