"""Helpers of the Numba kernels: compiling, element conversion, ordered integers, and exp."""

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
from numba.np.numpy_support import as_dtype

from server.engine.cpu.amx_code import has_amx
from server.engine.cpu.kernel_cache import kernel_cache

_intrinsic: Any = intrinsic  # compiled code calls the result without the context

# Whether AMX is permitted depends on the container, not on the processor.
_KERNEL_CACHE = kernel_cache(variant="-amx" if has_amx() else "")
if _KERNEL_CACHE is not None:
    config.CACHE_DIR = str(_KERNEL_CACHE)  # type: ignore[attr-defined]
config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # torch's pool; a second one would compete for the cores

# Sums may be reordered and fused. NaN has to stay NaN, because it reveals an overflow.
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
    """Set the number of threads of torch's operations and of the kernels, the calling thread included.

    Both share one pool. Numba resets it to one thread per core when it starts, so it is started before torch's
    number is set.
    """
    numba.set_num_threads(min(number, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(number)


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile with Numba, and cache the result on disk if a cache folder can be written."""

    def decorate(function: Any) -> Any:
        has_cache = _KERNEL_CACHE is not None
        return njit(fastmath=_FAST, nogil=True, error_model="numpy", cache=has_cache, **options)(function)

    return decorate


def compiled_twice(function: Any) -> tuple[Any, Any]:
    """Compile a serial and a parallel version; only the second divides ``prange`` loops among threads.

    Waking a thread takes about 50 us, so callers choose by the amount of work.
    """
    copy: Any = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_in_parallel")
    copy.__qualname__ = copy.__name__  # names the entry in Numba's disk cache
    return compiled()(function), compiled(parallel=True)(copy)


KINDS: dict[torch.dtype, Elements] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
}
"""An empty array for each dtype; it gives a kernel the element type at an address."""


def elements(tensor: torch.Tensor) -> Elements:
    """A tensor's memory as a NumPy array; bfloat16 is viewed as uint16, because Numba has no bfloat16."""
    array: Elements = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


@_intrinsic
def _pointer(_context, address):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def array_at(_address: Any, _shape: Any, _kind: Any) -> Any:
    """The array at ``tensor.data_ptr()`` of a contiguous tensor, in compiled code only.

    Converting a tensor to an array outside of compiled code takes microseconds per layer and step.

    Args:
        _address: int64.
        _shape: Shape of the array.
        _kind: An array of the same element type, such as one of ``KINDS``.
    """
    raise NotImplementedError


@overload(array_at)
def _overload_array_at(address, shape, kind):  # type: ignore[no-untyped-def]
    dtype = as_dtype(kind.dtype)
    return lambda address, shape, kind: carray(_pointer(address), shape, dtype)


def is_bfloat16(_array: Any) -> Any:
    """Whether an array holds bfloat16, viewed as uint16; in compiled code only."""
    raise NotImplementedError


@overload(is_bfloat16, inline="always")
def _overload_is_bfloat16(array):  # type: ignore[no-untyped-def]
    is_bfloat16 = array.dtype == types.uint16
    return lambda array: is_bfloat16


def float32_of(_element: Any) -> Any:
    """An element as float32, in compiled code only."""
    raise NotImplementedError


@overload(float32_of, inline="always")
def _overload_float32_of(element):  # type: ignore[no-untyped-def]
    if element == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda element: np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return lambda element: element


def element_of(_number: Any, _array: Any) -> Any:
    """A float32 rounded (to nearest even) to the element type of ``_array``, in compiled code only."""
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
def _flip_negative(bits):  # type: ignore[no-untyped-def]
    """Invert all bits but the sign if the number is negative; its own inverse."""
    return np.int32(bits ^ (np.int32(bits >> _SIGN) & _ALL_BUT_SIGN))


@compiled()
def ordered_int(x):  # type: ignore[no-untyped-def]
    """Map a float32 to an int32 of the same order; NaN lie beyond the infinity of their sign.

    LLVM vectorises the maximum of integers, but not of floats, where a NaN makes the result depend on the order.
    """
    return _flip_negative(np.float32(x).view(np.int32))


@compiled()
def float32_of_ordered(number):  # type: ignore[no-untyped-def]
    """The inverse of ``ordered_int``."""
    return np.int32(_flip_negative(number)).view(np.float32)


@compiled()
def exp(x):  # type: ignore[no-untyped-def]
    """The exponential of a float32, written out because LLVM does not vectorise calls of libm; NaN stays NaN."""
    x = _LEAST_EXPONENT if x < _LEAST_EXPONENT else x  # noqa: FURB136 - one instruction, unlike max()
    x = _GREATEST_EXPONENT if x > _GREATEST_EXPONENT else x  # noqa: FURB136
    power = np.floor(x * _LOG2_E + np.float32(0.5))
    x = x - power * _LN_2_HIGH - power * _LN_2_LOW
    y = ((((_C0 * x + _C1) * x + _C2) * x + _C3) * x + _C4) * x + _C5
    y = y * x * x + x + np.float32(1.0)
    return y * np.int32((np.int32(power) + _EXPONENT_BIAS) * _EXPONENT_UNIT).view(np.float32)
