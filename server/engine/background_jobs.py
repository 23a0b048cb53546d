"""Jobs in a thread beside the step loop."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

_STACK_SIZE_LOCK = threading.Lock()
"""The stack size of new threads is a setting of the whole process."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job(Generic[Key, Result]):
    key: Key
    run: Callable[[threading.Event], Result]
    cancelled: threading.Event = field(default_factory=threading.Event)


class BackgroundJobs(Generic[Key, Result]):
    """Runs jobs one at a time in a thread; the step loop collects their results.

    Tenants take turns, and the jobs of a tenant run in the order of submission. ``take_ended`` is called from the
    step loop, all other methods from any thread.

    Args:
        name: Name of the thread, which starts with the first job.
        on_ended: Called from the thread after each job, to wake the step loop.
        stack_bytes: Stack size of the thread; 0 means the platform's default.
    """

    def __init__(self, name: str, *, on_ended: Callable[[], None], stack_bytes: int = 0) -> None:
        self._on_ended = on_ended
        self._stack_bytes = stack_bytes
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, OrderedDict[Key, _Job[Key, Result]]] = OrderedDict()
        """By tenant; the first tenant has the next turn."""
        self._tenants: dict[Key, str] = {}
        self._running: _Job[Key, Result] | None = None
        self._ended: SimpleQueue[tuple[Key, Result | BaseException]] = SimpleQueue()

    def submit(self, key: Key, run: Callable[[threading.Event], Result], *, tenant: str = "") -> None:
        """Add a job; if one with this key is waiting, it keeps its place and this one is dropped.

        Args:
            key: Identifies the job.
            run: Called in the thread, with an event that is set when the job is cancelled.
            tenant: Whose turn the job takes.

        Raises:
            RuntimeError: After ``stop``.
        """
        with self._lock:
            if key in self._tenants:
                return
            with _STACK_SIZE_LOCK:
                usual = threading.stack_size(self._stack_bytes)
                try:
                    self._executor.submit(self._run_next)
                finally:
                    threading.stack_size(usual)
            self._tenants[key] = tenant
            self._waiting.setdefault(tenant, OrderedDict())[key] = _Job(key, run)

    def num_waiting(self, tenant: str) -> int:
        """Number of a tenant's jobs that have not started."""
        with self._lock:
            return len(self._waiting.get(tenant, ()))

    def cancel(self, key: Key) -> None:
        """Drop a waiting job, or set the event of a running one. Its result, if any, is still collected."""
        with self._lock:
            self._remove(key)
            if self._running is not None and self._running.key == key:
                self._running.cancelled.set()

    def take_ended(self) -> list[tuple[Key, Result | BaseException]]:
        """Keys and results of the jobs that have ended since the last call; the error of a job that raised one."""
        ended: list[tuple[Key, Result | BaseException]] = []
        while True:
            try:
                ended.append(self._ended.get_nowait())
            except Empty:
                return ended

    def stop(self) -> None:
        """Take no more jobs, drop the waiting ones, and set the event of the running one."""
        self._executor.shutdown(wait=False)
        with self._lock:
            self._waiting.clear()
            self._tenants.clear()
            if self._running is not None:
                self._running.cancelled.set()

    def close(self) -> None:
        """Stop, and wait for the running job."""
        self.stop()
        self._executor.shutdown(wait=True)

    def _run_next(self) -> None:
        """Run the next job, in the thread. Called once per submitted job, so it finds none if one was dropped."""
        with self._lock:
            job = self._running = self._take()
        if job is None:
            return
        result: Result | BaseException
        try:
            result = job.run(job.cancelled)
        except BaseException as error:  # a panic of a Rust library is not an Exception
            result = error
        with self._lock:
            self._running = None
        self._ended.put((job.key, result))
        self._on_ended()

    def _take(self) -> _Job[Key, Result] | None:
        if not self._waiting:
            return None
        tenant, jobs = next(iter(self._waiting.items()))
        self._waiting.move_to_end(tenant)
        return self._remove(next(iter(jobs)))

    def _remove(self, key: Key) -> _Job[Key, Result] | None:
        tenant = self._tenants.pop(key, None)
        if tenant is None:
            return None
        jobs = self._waiting[tenant]
        job = jobs.pop(key)
        if not jobs:
            del self._waiting[tenant]
        return job
