"""A CUDA stream for copies beside the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from server.engine.attention.transfers import Mark


class CUDACopyStream:
    """``CopyStream`` of a GPU: the copies have a stream, and marks are events.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Mark:
        """An event behind all operations that the calling thread has queued."""
        # A thread that waits for it sleeps: it must not take a core from the step loop.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        mark: Mark = event
        return mark

    @contextmanager
    def after(self, mark: Mark) -> Iterator[None]:
        """Queue the calling thread's operations on the stream, behind an event."""
        with torch.cuda.stream(self._stream):
            mark.wait()
            yield
