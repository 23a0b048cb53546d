"""Counts the memory of tensors, also of those on the device "meta", which have no content."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the bytes of the tensors that operations return, until they are released.

    Memory within an operation, such as a sort's second buffer, is not counted.

    Args:
        device: Only tensors on this device are counted.

    Attributes:
        peak: Maximum number of bytes at once.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._device = device
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0
        """Bytes of ``_live``, including what was released since it was last searched."""

    @property
    def current(self) -> int:
        """Bytes that are not released."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        self._bound = sum(size for _, size in self._live.values())
        return self._bound

    def reset_peak(self) -> None:
        """Start a new maximum."""
        self.peak = self.current

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._bound += size - (self._live[key][1] if key in self._live else 0)
                self._live[key] = StorageWeakRef(storage), size  # type: ignore[no-untyped-call]
        if self._bound > self.peak:  # only then is there something to find
            self.peak = max(self.peak, self.current)
        return result
