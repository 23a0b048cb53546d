"""Vector code for bfloat16 on processors that multiply it by themselves: sums of products of pairs, in float32.

Intel's and AMD's VDPBF16PS (AVX512_BF16) multiplies 32 bfloat16 by 32 others and adds the products of each two
neighbours to one of 16 sums. Nothing has to be widened, and one instruction does what otherwise takes two of four.
What it computes is exact but for the order of the sums and for denormal numbers, which count as zero.
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

_intrinsic: Any = intrinsic  # what it makes is called by compiled code alone, without the context

PAIRED = 2 * LANES
"""Elements that one instruction multiplies: heads have to be a multiple of it."""


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_SHORTS, _BFLOATS = ir.VectorType(SHORT, PAIRED), ir.VectorType(_BFloat(), PAIRED)
_LOW, _HIGH = (
    ir.Constant(
        ir.VectorType(INT, PAIRED),
        [which * PAIRED + first + lane for lane in range(LANES) for which in (0, 1)],
    )
    for first in (0, LANES)
)


@cache
def has_pairs() -> bool:
    """Whether the processor that kernels are compiled for has the instruction."""
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # type: ignore[attr-defined]
        return False  # for another than this one
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


@_intrinsic
def score_pairs(  # type: ignore[no-untyped-def]
    _context, query, query_at, scale, keys, slots, slots_at, stride, base, width, scores, scores_at
):
    """As ``score_positions``, of bfloat16.

    Args:
        query: bfloat16 seen as uint16.
        query_at: int64, as are all other scalars but the scale.
        scale: float32, by which the products are multiplied.
        keys: bfloat16 seen as uint16.
        slots: As in ``score_positions``; so are the rest.
        slots_at: Likewise.
        stride: Likewise.
        base: Likewise.
        width: A multiple of ``PAIRED``.
        scores: float32.
        scores_at: Where the sixteen are written.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = _PairCode(context, builder, signature.args, arguments)
        starts = code.starts(slots=4, slots_at=5, stride=6, base=7)
        products = code.products(0, arguments[1], 3, starts, width=8)
        code.store(code.multiply(products, code.repeat(arguments[2])), 9, arguments[10])
        return context.get_dummy_value()

    arguments = (query, query_at, scale, keys, slots, slots_at, stride, base, width, scores, scores_at)
    return types.void(*arguments), generate


@_intrinsic
def pair_positions(_context, array, slots, slots_at, stride, base, width, pairs):  # type: ignore[no-untyped-def]
    """Copy one head's values of sixteen positions, those of each two neighbours element by element in turn.

    ``pairs[2 * p * width:][:2 * width]`` becomes the values of positions ``2 * p`` and ``2 * p + 1``: the first
    of one, the first of the other, the second of one and so on. The arguments are like those of ``score_pairs``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = Code(context, builder, signature.args, arguments)
        starts = code.starts(slots=1, slots_at=2, stride=3, base=4)
        with code.steps(width=5, step=PAIRED) as at:
            for pair in range(LANES // 2):
                even, odd = (
                    builder.load(code.pointer(0, builder.add(start, at), SHORT, _SHORTS), align=2)
                    for start in starts[2 * pair : 2 * pair + 2]
                )
                place = builder.mul(LONG(2), builder.add(builder.mul(LONG(pair), arguments[5]), at))
                for further, order in ((0, _LOW), (PAIRED, _HIGH)):
                    target = code.pointer(6, builder.add(place, LONG(further)), SHORT, _SHORTS)
                    builder.store(builder.shuffle_vector(even, odd, order), target, align=2)
        return context.get_dummy_value()

    return types.void(array, slots, slots_at, stride, base, width, pairs), generate


@_intrinsic
def add_pairs(_context, weights, weights_at, pairs, width, out, out_at):  # type: ignore[no-untyped-def]
    """Add what ``pair_positions`` made of sixteen positions, each times its weight.

    ``out[out_at:][:width]`` grows by the sum over p of ``weights[weights_at + p]`` times the values of position p.

    Args:
        weights: bfloat16 seen as uint16.
        weights_at: int64, as are all other scalars.
        pairs: bfloat16 seen as uint16.
        width: A multiple of ``PAIRED``.
        out: float32.
        out_at: Where the results begin.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = _PairCode(context, builder, signature.args, arguments)
        shares = []
        for pair in range(LANES // 2):
            two = code.pointer(0, builder.add(arguments[1], LONG(2 * pair)), SHORT, INT)
            shares.append(builder.bitcast(code.repeat(builder.load(two, align=2)), _BFLOATS))
        with code.steps(width=3) as at:
            place = builder.add(arguments[5], at)
            # Two sums side by side: in one, each product would wait for that before it.
            sums = [code.load(4, place), ZERO]
            for pair, share in enumerate(shares):
                first = builder.mul(LONG(2), builder.add(builder.mul(LONG(pair), arguments[3]), at))
                sums[pair % 2] = code.multiply_add(share, code.factors(2, first), sums[pair % 2])
            code.store(code.add(*sums), 4, place)
        return context.get_dummy_value()

    return types.void(weights, weights_at, pairs, width, out, out_at), generate


class _PairCode(Code):
    """Multiplies 32 bfloat16 by 32 others."""

    step = PAIRED

    def factors(self, array: int, at: Any) -> Any:
        """32 elements."""
        shorts = self.builder.load(self.pointer(array, at, SHORT, _SHORTS), align=2)
        return self.builder.bitcast(shorts, _BFLOATS)

    def multiply_add(self, left: Any, right: Any, addend: Any) -> Any:
        """``addend`` and the sums of each two neighbouring products."""
        kind = ir.FunctionType(VECTOR, [VECTOR, _BFLOATS, _BFLOATS])
        instruction = get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return self.builder.call(instruction, [addend, left, right])
