"""Work in threads, shared out fairly between tenants; and what one request has cost so far."""

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
"""Work on at most so many characters is short: it takes milliseconds."""

_TURN_CHARS = 256
"""What a turn costs besides its characters."""


@dataclass(slots=True)
class Work:
    """What is done for one request.

    Attributes:
        tenant: For whom.
        num_tokens: Tokens that its texts were turned into so far, whatever becomes of it.
    """

    tenant: str = SHARED
    num_tokens: int = 0


_CURRENT: ContextVar[Work] = ContextVar("work")


@contextmanager
def working_for(tenant: str) -> Iterator[Work]:
    """Do everything in the block, and in tasks that it starts, for a tenant."""
    work = Work(tenant)
    token = _CURRENT.set(work)
    try:
        yield work
    finally:
        _CURRENT.reset(token)


def current_work() -> Work:
    """What is being done now; outside of every ``working_for``, work for nobody in particular."""
    return _CURRENT.get(None) or Work()


@dataclass(slots=True, eq=False)
class _Job:
    size: int
    arrival: int
    turn: asyncio.Future[None]


@dataclass(slots=True)
class _Queue:
    """One tenant's waiting jobs, each kind in order of arrival.

    Attributes:
        served: Characters that it had its turns for, counted from where it began to wait among others.
    """

    served: int
    short: deque[_Job] = field(default_factory=deque)
    long: deque[_Job] = field(default_factory=deque)


class FairThreads:
    """A few threads that tenants share. Used on one event loop only, so it needs no lock.

    The next turn is that of the tenant with the fewest characters worked on since it began to wait (start-time fair
    queueing), so a tenant with much to do only delays itself. Long work never takes the last thread: a short text
    waits for short work only. What is cancelled while it waits is never begun.

    Args:
        num_threads: At least 2.
        name: Prefix of the threads' names.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        if num_threads < 2:
            raise ValueError("one thread is kept for short work, so there have to be two")
        self._num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._queues: dict[str, _Queue] = {}
        self._now = 0
        """``served`` of the tenant that last had a turn."""
        self._num_arrived = 0
        self._num_running = 0
        self._num_long = 0

    async def run(self, function: Callable[[], T], *, size: int) -> T:
        """Run a function in a thread, when the current tenant has its turn.

        Args:
            function: What to do; it should not take longer than its size says, for it cannot be interrupted.
            size: Characters that it works on.
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
        """Wait for what runs, and end the threads."""
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
        """The kind of work that a tenant would begin with; None if it has nothing that may begin now."""
        for jobs in (queue.short, queue.long):
            while jobs and jobs[0].turn.cancelled():
                jobs.popleft()
        may_be_long = self._num_long < self._num_threads - 1
        ready = [jobs for jobs in (queue.short, queue.long if may_be_long else None) if jobs]
        return min(ready, key=lambda jobs: jobs[0].arrival, default=None)

    def _announce_end(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            loop.call_soon_threadsafe(self._end, job)

    def _end(self, job: _Job) -> None:
        self._num_running -= 1
        self._num_long -= self._is_long(job)
        self._begin_turns()
        if not self._num_running:  # nothing waits either: whoever comes next is equal to all others
            self._queues.clear()
            self._now = 0

    @staticmethod
    def _is_long(job: _Job) -> bool:
        return job.size > SHORT_CHARS
