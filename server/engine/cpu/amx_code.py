"""LLVM code for products of small bfloat16 matrices by AMX, on processors with AMX-BF16.

One instruction multiplies 16 rows of 32 elements by 32 rows of 16 columns, and adds the result to 16 x 16 float32
sums. Rows of the second matrix are interleaved in pairs, as for VDPBF16PS (see ``bf16_dot``). Denormals count as
zero. Sources: chapter 3 of Intel's Architecture Instruction Set Extensions Programming Reference, and
Documentation/arch/x86/xstate.rst of Linux.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.core.cgutils import alloca_once, for_range_slice, get_or_insert_function
from numba.extending import intrinsic

from server.engine.cpu.bf16_dot import BF16_LANES, has_bf16_dot
from server.engine.cpu.vector_code import FLOAT, LANES, LONG, SHORT, Code

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

AMX_ROWS = 16
"""Rows of a tile register."""

_ROW_BYTES = 64
_NUM_TILES = 8
_LEFT, _RIGHTS = 4, (5, 6)
"""Tile registers of the factors; registers 0 to 3 hold sums."""

_BYTE = ir.IntType(8)
_BYTES = _BYTE.as_pointer()

# arch_prctl(2) asks the kernel for the state of the tile registers, once per process.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@cache
def has_amx() -> bool:
    """Whether kernels may use AMX-BF16: the processor has it, and the operating system permits it.

    False where ``has_bf16_dot`` is false.
    """
    features = binding.get_host_cpu_features()
    if not (has_bf16_dot() and features.get("amx-tile", False) and features.get("amx-bf16", False)):
        return False
    return _is_permitted()


def _is_permitted() -> bool:
    """Ask for the tile registers, which Linux denies until then; oneDNN asks for them too."""
    if platform.system() != "Linux":
        return False
    result: int = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return result == 0


class AMXCode(Code):
    """Code with tile registers."""

    def _call(self, name: str, *arguments: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        self.builder.call(get_or_insert_function(self.builder.module, kind, f"llvm.x86.{name}"), arguments)

    def configure(self) -> None:
        """Give all tile registers 16 rows of 64 bytes."""
        header = [1] + [0] * 15  # palette 1, first row 0
        widths = [_ROW_BYTES, 0] * _NUM_TILES + [0] * 16
        heights = [AMX_ROWS] * _NUM_TILES + [0] * 8
        content = ir.Constant(ir.ArrayType(_BYTE, 64), header + widths + heights)
        place = alloca_once(self.builder, content.type)
        self.builder.store(content, place)
        self._call("ldtilecfg", self.builder.bitcast(place, _BYTES))

    def release(self) -> None:
        """Give the tile registers back."""
        self._call("tilerelease")

    def clear_tile(self, tile: int) -> None:
        """Set a register to zero."""
        self._call("tilezero", _BYTE(tile))

    def load_tile(self, tile: int, array: int, at: Any, stride: Any) -> None:
        """Load 16 rows of 64 bytes; ``stride`` is in elements."""
        self._call("tileloadd64", _BYTE(tile), *self._place(array, at, stride))

    def store_tile(self, tile: int, array: int, at: Any, stride: Any) -> None:
        """Store 16 rows of 64 bytes; ``stride`` is in elements."""
        self._call("tilestored64", _BYTE(tile), *self._place(array, at, stride))

    def multiply_add_tiles(self, total: int, left: int, right: int) -> None:
        """Add the product of two registers to a third."""
        self._call("tdpbf16ps", _BYTE(total), _BYTE(left), _BYTE(right))

    def _place(self, array: int, at: Any, stride: Any) -> tuple[Any, Any]:
        element, size = (SHORT, 2) if array in self._is_short else (FLOAT, 4)
        return self.pointer(array, at, element, _BYTE), self.builder.mul(stride, LONG(size))

    def add_products(
        self, left: int, left_at: Any, left_stride: Any, right: int, right_at: Any, right_stride: Any, steps: Any,
        num_tiles: int,
    ) -> None:  # fmt: skip
        """Add products to the first ``num_tiles`` registers; the arguments are those of ``multiply_block``."""
        builder = self.builder
        with for_range_slice(builder, LONG(0), steps, LONG(BF16_LANES)) as (at, _):
            self.load_tile(_LEFT, left, builder.add(left_at, at), left_stride)
            line = builder.add(right_at, builder.mul(at, right_stride))
            for tile in range(num_tiles):
                register = _RIGHTS[tile % len(_RIGHTS)]
                place = builder.add(line, LONG(BF16_LANES * tile))
                self.load_tile(register, right, place, builder.mul(right_stride, LONG(2)))
                self.multiply_add_tiles(tile, _LEFT, register)


@_intrinsic
def configure_tiles(_context):  # type: ignore[no-untyped-def]
    """Prepare the tile registers of this thread for ``multiply_block`` and ``add_block``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        AMXCode(context, builder, signature.args, arguments).configure()
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def release_tiles(_context):  # type: ignore[no-untyped-def]
    """Undo ``configure_tiles``, so that a switch of threads does not save the registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        AMXCode(context, builder, signature.args, arguments).release()
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def multiply_block(_context, left, left_at, width, right, columns, num_columns, out):  # type: ignore[no-untyped-def]
    """Multiply ``AMX_ROWS`` rows of factors by the first columns of a matrix.

    ``out[row * columns + column]`` becomes the sum over k of ``left[left_at + row * width + k]`` times the factor of
    row k and ``column`` of ``right``, which is at ``(k - k % 2) * columns + 2 * column + k % 2``.

    Args:
        left: bfloat16 viewed as uint16, like ``right``; all arrays are C-contiguous and indexed as flat.
        left_at: int64, as all other scalars.
        width: Factors of each sum, a multiple of 32, and elements from row to row of ``left``.
        right: The matrix.
        columns: Columns of ``right`` and of ``out``.
        num_columns: Columns to compute, a multiple of 32.
        out: float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = AMXCode(context, builder, signature.args, arguments)
        left_at, width, columns, num_columns = (arguments[index] for index in (1, 2, 4, 5))
        with for_range_slice(builder, LONG(0), num_columns, LONG(2 * LANES)) as (column, _):
            for tile in range(2):
                code.clear_tile(tile)
            code.add_products(0, left_at, width, 3, builder.mul(LONG(2), column), columns, width, 2)
            for tile in range(2):
                code.store_tile(tile, 6, builder.add(column, LONG(LANES * tile)), columns)
        return context.get_dummy_value()

    return types.void(left, left_at, width, right, columns, num_columns, out), generate


@_intrinsic
def add_block(_context, left, columns, steps, right, width, out, out_at, scales):  # type: ignore[no-untyped-def]
    """Multiply ``AMX_ROWS`` rows of factors by a matrix, and add to sums that are scaled first.

    ``out[out_at + row * width + column]`` is multiplied by ``scales[row]``; then the sum over k of
    ``left[row * columns + k]`` times the factor of row k and ``column`` of ``right`` is added, as in
    ``multiply_block``.

    Args:
        left: bfloat16 viewed as uint16, like ``right``.
        columns: int64, as all scalars: elements from row to row of ``left``.
        steps: Factors of each sum, a multiple of 32.
        right: The matrix.
        width: Columns of ``right`` and of ``out``, a multiple of 32.
        out: float32.
        out_at: First sum.
        scales: [16] float32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        code = AMXCode(context, builder, signature.args, arguments)
        columns, steps, width, out_at = (arguments[index] for index in (1, 2, 4, 6))
        for row in range(AMX_ROWS):
            scale, first = code.splat(7, LONG(row)), builder.add(out_at, builder.mul(LONG(row), width))
            with for_range_slice(builder, LONG(0), width, LONG(LANES)) as (column, _):
                place = builder.add(first, column)
                code.store(code.multiply(scale, code.load(5, place)), 5, place)
        with for_range_slice(builder, LONG(0), width, LONG(2 * LANES)) as (column, _):
            places = [builder.add(out_at, builder.add(column, LONG(LANES * tile))) for tile in range(2)]
            for tile, place in enumerate(places):
                code.load_tile(tile, 5, place, width)
            code.add_products(0, LONG(0), columns, 3, builder.mul(LONG(2), column), width, steps, 2)
            for tile, place in enumerate(places):
                code.store_tile(tile, 5, place, width)
        return context.get_dummy_value()

    return types.void(left, columns, steps, right, width, out, out_at, scales), generate
