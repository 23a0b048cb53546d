"""Whether an exception means that the device itself has failed, and not the computation of some row."""

from __future__ import annotations

import torch

_MARKS = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")
"""What such errors say where they are plain RuntimeErrors."""


def is_device_fault(error: BaseException) -> bool:
    """Whether no further pass can be trusted, or even begun, after this.

    After an illegal access or a failed assertion in a kernel a CUDA context answers every call with the same error,
    whoever makes it. Memory that is short is another matter: a smaller pass may fit.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
