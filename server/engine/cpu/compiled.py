"""What the kernels that Numba compiles have in common: how they are compiled, elements, and exp."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import config
from numba.extending import intrinsic, overload

from server.engine.cpu.kernel_cache import kernel_cache

_intrinsic: Any = intrinsic  # what it makes is called by compiled code alone, without the context

_KERNEL_CACHE = kernel_cache()
if _KERNEL_CACHE is not None:
    config.CACHE_DIR = str(_KERNEL_CACHE)  # type: ignore[attr-defined]
config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # torch's own pool; another would fight it for the cores

# Sums may be taken in any order, and fused; but NaN has to stay NaN, for that is how an overflow is found.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_LOG2_E = np.float32(1.44269504)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST_EXPONENT, _GREATEST_EXPONENT = np.float32(-87.0), np.float32(88.0)
_EXPONENT_BIAS, _EXPONENT_UNIT = np.int32(127), np.int32(1 << 23)
# Cephes' expf (netlib.org/cephes): minimax polynomial of (exp(x) - 1 - x) / x**2 on [-ln 2 / 2, ln 2 / 2].
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_HALF_OF_LAST, _ONE, _NAN = np.uint32(0x7FFF), np.uint32(1), np.uint32(0x7FC0)
_SIGN, _ALL_BUT_SIGN = np.int32(31), np.int32((1 << 31) - 1)

Elements = npt.NDArray[np.float32 | np.uint16]


def set_num_threads(number: int) -> None:
    """Let torch's operations and the kernels use so many threads, the calling one included.

    Both have one pool, and Numba gives it a thread for every core when it starts, whatever torch was told before. So
    it is started here, and torch told afterwards.
    """
    numba.set_num_threads(min(number, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(number)


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile with Numba, and keep the result on disk for the next start where there is a place for it."""

    def decorate(function: Any) -> Any:
        keeps = _KERNEL_CACHE is not None
        return njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=keeps, **options)(function)

    return decorate


def compiled_twice(function: Any) -> tuple[Any, Any]:
    """Compile for one thread, and for all: loops over ``prange`` are shared out by the second alone.

    Waking another thread takes some 50 us, so callers choose by how much there is to do.
    """
    copy: Any = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_in_parallel")
    copy.__qualname__ = copy.__name__  # the name that Numba files it under on the disk
    return compiled()(function), compiled(parallel=True)(copy)


KINDS: dict[torch.dtype, Elements] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
}
"""For each dtype an array of its elements; kernels take it to know what lies at an address."""


def elements(tensor: torch.Tensor) -> Elements:
    """The same memory for Numba, which has no bfloat16: it sees uint16."""
    array: Elements = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


@_intrinsic
def _pointer(_context, address):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def array_at(_address: Any, _shape: Any, _kind: Any) -> Any:
    """The array at ``tensor.data_ptr()`` of a contiguous tensor; only means something inside compiled code.

    An array made of a tensor outside takes microseconds, and there are some for each layer of each step.

    Args:
        _address: int64.
        _shape: Of the array.
        _kind: One of ``KINDS``.
    """
    raise NotImplementedError


@overload(array_at)
def _overload_array_at(address, shape, kind):  # type: ignore[no-untyped-def]
    dtype = np.uint16 if kind.dtype == types.uint16 else np.float32
    return lambda address, shape, kind: carray(_pointer(address), shape, dtype)


def float32_of(_element: Any) -> Any:
    """An element as float32; only means something inside compiled code."""
    raise NotImplementedError


@overload(float32_of, inline="always")
def _overload_float32_of(element):  # type: ignore[no-untyped-def]
    if element == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: element


def element_of(_number: Any, _array: Any) -> Any:
    """A float32, rounded to the nearest (even) element of such an array; only means something in compiled code."""
    raise NotImplementedError


@overload(element_of)
def _overload_element_of(number, array):  # type: ignore[no-untyped-def]
    if array.dtype != types.uint16:
        return lambda number, array: number

    def rounded(number, array):  # type: ignore[no-untyped-def]
        bits = np.float32(number).view(np.uint32)
        upper = np.uint32(bits + _HALF_OF_LAST + ((bits >> np.uint32(16)) & _ONE)) >> np.uint32(16)
        return np.uint16(upper if number == number else _NAN)

    return rounded


@compiled()
def _turned(bits):  # type: ignore[no-untyped-def]
    """All bits but the sign of a negative number turned over; twice is as it was."""
    return np.int32(bits ^ (np.int32(bits >> _SIGN) & _ALL_BUT_SIGN))


@compiled()
def in_order(x):  # type: ignore[no-untyped-def]
    """An int32 that is the larger, the larger a float32 is; NaN are beyond the infinities, on the side of their sign.

    The largest of floats may not be looked for in any order, since one of them could be NaN, so LLVM makes no vectors
    of it; of integers it does.
    """
    return _turned(np.float32(x).view(np.int32))


@compiled()
def float32_in_order(number):  # type: ignore[no-untyped-def]
    """The float32 of which ``in_order`` made this."""
    return np.int32(_turned(number)).view(np.float32)


@compiled()
def exp(x):  # type: ignore[no-untyped-def]
    """The exponential of a float32, written out, for LLVM vectorises no call of libm's; NaN stays NaN."""
    x = _LEAST_EXPONENT if x < _LEAST_EXPONENT else x  # noqa: FURB136 - one instruction; max() is a chain of them
    x = _GREATEST_EXPONENT if x > _GREATEST_EXPONENT else x  # noqa: FURB136
    power = np.floor(x * _LOG2_E + np.float32(0.5))
    x = x - power * _LN_2_HIGH - power * _LN_2_LOW
    y = ((((_C0 * x + _C1) * x + _C2) * x + _C3) * x + _C4) * x + _C5
    y = y * x * x + x + np.float32(1.0)
    return y * np.int32((np.int32(power) + _EXPONENT_BIAS) * _EXPONENT_UNIT).view(np.float32)
