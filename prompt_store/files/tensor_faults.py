"""Faults of the dtype and the values of a tensor, and of a field of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from prompt_store.errors import Fault
from prompt_store.files.numerics import count_non_finite, count_overflows, is_harmless
from prompt_store.types import CONFIG_FILE, ROWS_TENSOR, WEIGHTS_FILE, TensorData

SERVED_DTYPES = ("F32", "F16", "BF16")

MAX_OF_A_CODE = 8
"""A file for another model would have thousands of faults, and eight show what is wrong."""


def weights_fault(code: str, message: str, tensor: str = ROWS_TENSOR) -> Fault:
    """A fault of a tensor; the message follows the name of the tensor."""
    return Fault(code, f"{WEIGHTS_FILE}: {tensor} {message}", WEIGHTS_FILE, tensor)


def config_fault(code: str, message: str, field: str | None = None) -> Fault:
    """A fault of the configuration; the message follows the name of the file."""
    return Fault(code, f"{CONFIG_FILE}: {message}", CONFIG_FILE, field)


def limited(faults: Sequence[Fault]) -> list[Fault]:
    """At most ``MAX_OF_A_CODE`` faults of each code, and one more with the number of the others."""
    kept: list[Fault] = []
    counts: dict[str, int] = {}
    for fault in faults:
        counts[fault.code] = counts.get(fault.code, 0) + 1
        if counts[fault.code] <= MAX_OF_A_CODE:
            kept.append(fault)
    for code, count in counts.items():
        if count > MAX_OF_A_CODE:
            kept.append(Fault(code, f"{count - MAX_OF_A_CODE} more faults of this kind ({code})"))
    return kept


def value_faults(name: str, tensor: TensorData, dtype: str, *, allow_float64: bool) -> list[Fault]:
    """Faults of a tensor's dtype and values.

    Args:
        name: The tensor's name.
        tensor: Of any dtype and shape.
        dtype: The dtype to which the values are rounded: ``float32``, ``bfloat16`` or ``float16``.
        allow_float64: Whether F64 is accepted.
    """
    if tensor.dtype not in SERVED_DTYPES and not (allow_float64 and tensor.dtype == "F64"):
        return [_dtype_fault(name, tensor.dtype)]
    if is_harmless(tensor, dtype):
        return []
    faults = []
    count, first = count_non_finite(tensor)
    if count:
        message = f"has {count} NaN or infinite values, {_place(tensor, first)}"
        faults.append(weights_fault("non_finite_values", message, name))
    count, first = count_overflows(tensor, dtype)
    if count:
        message = f"has {count} values beyond the range of the serving dtype {dtype}, {_place(tensor, first)}"
        faults.append(weights_fault("dtype_overflow", message, name))
    return faults


def shown_number(value: int | None) -> str:
    """A number in a message; Python refuses to print integers of more than 4,300 digits."""
    return str(value) if value is not None and value < 10**18 else "a huge number"


def _dtype_fault(name: str, dtype: str) -> Fault:
    served = f"{', '.join(SERVED_DTYPES)} are taken"
    if dtype == "F64":
        message = f"has dtype F64, which no model is served in: re-save as float32; {served}"
    else:
        message = f"has dtype {dtype}; {served}"
    return weights_fault("unsupported_dtype", message, name)


def _place(tensor: TensorData, index: int) -> str:
    width = tensor.shape[-1] if tensor.shape else 1
    return f"the first at row {index // width}, column {index % width}"
