"""A copy stream on the host that runs its copies as late as a device may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from server.engine.attention.transfers import Mark


class LazyMark:
    """A point behind some of a stream's copies."""

    def __init__(self, stream: LazyStream, number: int) -> None:
        self._stream, self.number = stream, number

    def synchronize(self) -> None:
        if not self._stream.ignores_marks:
            self._stream.run(self.number)

    def wait(self) -> None:
        self._stream.notes.append("wait for the steps")


class LazyStream:
    """Queues copies to the device, and runs them when a thread waits for a mark behind them.

    Args:
        ignores_marks: Return from every wait at once, as if there were no marks.

    Attributes:
        notes: What happened, in order.
        pause: Called before each copy runs.
    """

    def __init__(self, *, ignores_marks: bool = False) -> None:
        self.ignores_marks = ignores_marks
        self.notes: list[str] = []
        self.pause: Callable[[], None] = lambda: None
        self._queued: list[Callable[[], object]] = []
        self._num_run = 0
        self._thread: threading.Thread | None = None

    def mark(self) -> LazyMark:
        if threading.current_thread() is not self._thread:
            self.notes.append("mark behind the steps")
            return LazyMark(self, 0)
        return LazyMark(self, len(self._queued))

    @contextmanager
    def after(self, mark: Mark) -> Iterator[None]:
        self._thread = threading.current_thread()
        mark.wait()
        with _Queueing(self):
            yield

    def queue(self, copy: Callable[[], object]) -> None:
        self._queued.append(copy)

    def run(self, number: int | None = None) -> None:
        """Run the first ``number`` copies, or all, unless they have run."""
        with _disable_current_modes():
            for copy in self._queued[self._num_run : number]:
                self.pause()
                self.notes.append("copy")
                copy()
                self._num_run += 1


class _Queueing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Queues writes to the device instead of running them."""

    def __init__(self, stream: LazyStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        # Copies into pinned memory are the host's.
        is_queued = name == "index_put_" or (name == "copy_" and arguments[2:] == (True,))
        if not is_queued:
            return function(*arguments, **(named or {}))
        self._stream.queue(lambda: function(*arguments, **(named or {})))
        return arguments[0]
