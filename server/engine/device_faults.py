"""Distinguishes failures of the device from failed computations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from server.errors import DeviceError

_MARKS = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")
"""Texts of device errors that arrive as plain RuntimeErrors."""


def is_device_fault(error: BaseException) -> bool:
    """Whether an exception means that no further pass on the device can succeed.

    After an illegal access or a failed assertion in a kernel, a CUDA context fails every call with the same error.
    Running out of memory is no device fault, because a smaller pass may fit.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def raise_if_device_failed(error: BaseException, check_device: Callable[[], None]) -> None:
    """Return if the device can compute further passes after one has failed.

    Args:
        error: The exception of the pass.
        check_device: ``Platform.check_device``.

    Raises:
        DeviceError: If it cannot.
    """
    fault = error
    if not is_device_fault(error):
        try:
            check_device()
        except Exception as found:  # of any type, because the device's state is unknown
            fault = found
        else:
            return
    raise DeviceError(f"the device failed ({type(fault).__name__}: {fault})") from error
