"""The memory of a GPU, as the driver and torch's allocator report it."""

from __future__ import annotations

import gc

import torch

from server.engine.attention.memory import MemoryReading


class CUDAMemory:
    """Reads the memory of one GPU. See ``attention.memory.DeviceMemory``.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settle(self) -> MemoryReading:
        """Wait for the GPU, return what torch caches but does not use, and start a new peak."""
        torch.cuda.synchronize(self._device)
        gc.collect()  # a released graph returns its memory only once it is collected
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return self.read()

    def read(self) -> MemoryReading:
        """The memory now, and the peak since ``settle``."""
        free, total = torch.cuda.mem_get_info(self._device)
        return MemoryReading(
            total=total,
            free=free,
            allocated=torch.cuda.memory_allocated(self._device),
            reserved=torch.cuda.memory_reserved(self._device),
            peak=torch.cuda.max_memory_allocated(self._device),
        )
