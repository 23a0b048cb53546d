"""Distinguishes failures of the device from failed computations."""

from __future__ import annotations

import torch

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
