"""Worker threads that are shared fairly between tenants, and the number of tokens that a request has used."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from prompt_store.types import SHARED

T = TypeVar("T")

SHORT_CHARS = 16_384
"""Maximum size of short work in characters; it takes milliseconds."""

_TURN_CHARS = 256
"""Fixed cost of a job, in characters."""


@dataclass(slots=True)
class Work:
    """The work for one request.

    Attributes:
        tenant: The tenant of the request.
        num_tokens: Number of tokens that its texts were converted to so far, even if it fails later.
    """

    tenant: str = SHARED
    num_tokens: int = 0


_CURRENT: ContextVar[Work] = ContextVar("work")


@contextmanager
def working_for(tenant: str) -> Iterator[Work]:
    """Account the block, and the tasks that it starts, to a tenant."""
    work = Work(tenant)
    token = _CURRENT.set(work)
    try:
        yield work
    finally:
        _CURRENT.reset(token)


def current_work() -> Work:
    """The current work; outside of ``working_for`` it belongs to no tenant."""
    return _CURRENT.get(None) or Work()


@dataclass(slots=True, eq=False)
class _Job:
    size: int
    arrival: int
    turn: asyncio.Future[None]


@dataclass(slots=True)
class _Queue:
    """The waiting jobs of one tenant, short and long ones, each in order of arrival.

    Attributes:
        served: Virtual time of the tenant: characters of its started jobs.
    """

    served: int
    short: deque[_Job] = field(default_factory=deque)
    long: deque[_Job] = field(default_factory=deque)


class FairThreads:
    """A thread pool that tenants share. Used on one event loop only, so it needs no lock.

    The next job is that of the tenant with the fewest characters served (start-time fair queueing), so a tenant with
    much work delays only itself. Long jobs never use the last free thread, so a short job waits for short jobs only.
    A job that is cancelled while it waits is never started.

    Args:
        num_threads: At least 2.
        name: Prefix of the thread names.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        if num_threads < 2:
            raise ValueError("at least two threads are needed: one is reserved for short work")
        self._num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._queues: dict[str, _Queue] = {}
        self._now = 0
        """``served`` of the tenant whose job was started last."""
        self._num_arrived = 0
        self._num_running = 0
        self._num_long = 0

    async def run(self, function: Callable[[], T], *, size: int) -> T:
        """Run a function in a thread, when it is the current tenant's turn.

        Args:
            function: The function; it cannot be interrupted.
            size: Number of characters that it processes.
        """
        loop = asyncio.get_running_loop()
        job = self._enqueue(current_work().tenant, size, loop)
        self._begin_turns()
        try:
            await job.turn
        except asyncio.CancelledError:
            if job.turn.done() and not job.turn.cancelled():
                self._end(job)
            raise
        future = self._executor.submit(function)
        future.add_done_callback(lambda _: self._announce_end(loop, job))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Wait for running jobs, and stop the threads."""
        self._executor.shutdown(wait=True)

    def _enqueue(self, tenant: str, size: int, loop: asyncio.AbstractEventLoop) -> _Job:
        queue = self._queues.setdefault(tenant, _Queue(self._now))
        if not (queue.short or queue.long):
            queue.served = max(queue.served, self._now)
        self._num_arrived += 1
        job = _Job(size, self._num_arrived, loop.create_future())
        (queue.long if self._is_long(job) else queue.short).append(job)
        return job

    def _begin_turns(self) -> None:
        while self._num_running < self._num_threads:
            heads = [(queue, head) for queue in self._queues.values() if (head := self._head(queue)) is not None]
            if not heads:
                return
            queue, jobs = min(heads, key=lambda item: (item[0].served, item[1][0].arrival))
            job = jobs.popleft()
            self._now = queue.served
            queue.served += _TURN_CHARS + job.size
            self._num_running += 1
            self._num_long += self._is_long(job)
            job.turn.set_result(None)

    def _head(self, queue: _Queue) -> deque[_Job] | None:
        """The tenant's queue (short or long) with the next job; None if no job may start now."""
        for jobs in (queue.short, queue.long):
            while jobs and jobs[0].turn.cancelled():
                jobs.popleft()
        may_be_long = self._num_long < self._num_threads - 1
        ready = [jobs for jobs in (queue.short, queue.long if may_be_long else None) if jobs]
        return min(ready, key=lambda jobs: jobs[0].arrival, default=None)

    def _announce_end(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
        with suppress(RuntimeError):  # the loop has ended: no caller waits
            loop.call_soon_threadsafe(self._end, job)

    def _end(self, job: _Job) -> None:
        self._num_running -= 1
        self._num_long -= self._is_long(job)
        self._begin_turns()
        if not self._num_running:  # nothing waits either: all tenants start equal again
            self._queues.clear()
            self._now = 0

    @staticmethod
    def _is_long(job: _Job) -> bool:
        return job.size > SHORT_CHARS
