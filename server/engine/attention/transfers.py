"""Small things on their way from the host to the device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

_HOST = torch.device("cpu")


@cache
def pins(device: torch.device) -> bool:
    """Whether copies from the host to a device are queued from pinned memory."""
    return device != _HOST and torch.accelerator.is_available()


def to_device(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of Python numbers on a device.

    ``torch.tensor(values, device=...)`` copies from memory that can be paged out, and waits until the device has come
    so far. From pinned memory the copy is queued like everything else; torch keeps the memory until it is done.

    Args:
        values: As for ``torch.tensor``.
        device: Where it is wanted.
        dtype: Of its elements; None is torch's choice.
    """
    return queue_copy(torch.tensor(values, dtype=dtype), device)


def queue_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, as in ``to_device``; the same tensor where the device is the host."""
    if not pins(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def queue_copies(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Several host tensors of one dtype, copied to a device as one; the same tensors where the device is the host."""
    if not pins(device):
        return [tensor.to(device) for tensor in tensors]
    flat = queue_copy(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
