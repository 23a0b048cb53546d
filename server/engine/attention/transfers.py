"""Copies between the host and the device that are queued, and do not wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Protocol

import torch

_HOST = torch.device("cpu")


class Mark(Protocol):
    """A point in the operations that are queued on the device."""

    def synchronize(self) -> None:
        """Let the calling thread wait until the device has reached the point."""

    def wait(self) -> None:
        """Let operations that the calling thread queues from now on wait for the point."""


class CopyStream(Protocol):
    """Copies beside the computation of the steps."""

    def mark(self) -> Mark:
        """A point behind all operations that the calling thread has queued."""

    def after(self, mark: Mark) -> AbstractContextManager[None]:
        """Queue the calling thread's operations beside those of the steps, behind a point."""


@cache
def pins(device: torch.device) -> bool:
    """Whether copies from the host to a device use pinned memory."""
    return device != _HOST and torch.accelerator.is_available()


def to_device(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of Python numbers on a device.

    ``torch.tensor(values, device=...)`` copies from pageable memory, and waits for the device. A copy from pinned
    memory is queued; torch keeps the memory until the copy is done.

    Args:
        values: As for ``torch.tensor``.
        device: The target.
        dtype: The element type; None for torch's choice.
    """
    return queue_copy(torch.tensor(values, dtype=dtype), device)


def queue_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device, as in ``to_device``; on the host it is the same tensor."""
    if not pins(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def queue_copies(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy several host tensors of one dtype to a device in one copy; on the host they are the same tensors."""
    if not pins(device):
        return [tensor.to(device) for tensor in tensors]
    flat = queue_copy(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def queue_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queue a copy of a tensor to the host.

    Returns:
        A function that waits for the copy, and for nothing that is queued after it, and returns the copy. A tensor on
        the host is returned itself.
    """
    if not pins(tensor.device):
        return tensor.cpu
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    is_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    is_copied.record()

    def wait() -> torch.Tensor:
        is_copied.synchronize()
        return copy

    return wait
