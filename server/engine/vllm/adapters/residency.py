"""Which of the registry's adapters vLLM holds. Pure logic: no torch, no vllm.

vLLM knows an adapter by an integer. Each digest gets a new one whenever it is loaded, so vLLM never takes one
adapter for another. At most ``capacity`` are loaded at once. vLLM would evict by itself, but it would then read files
within a step, where an error ends the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from prompt_store.histogram import LOAD_SECONDS_BOUNDS
from server.engine.stats import STEP_SECONDS_BOUNDS, EngineStats
from server.engine.types import AdapterSource

MAX_PASSED = 32
"""Requests that may pass one that waits for room, because their adapter is loaded."""


@dataclass(slots=True)
class _Entry:
    number: int
    nbytes: int
    users: int = 0
    loading: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    source: AdapterSource
    granted: asyncio.Future[_Entry]
    passed: int = 0


@dataclass(slots=True)
class Adapters:
    """The adapters that are loaded, on one event loop.

    Args:
        load: Loads an adapter under a number; what it raises is raised to all who wait for it.
        unload: Ends what ``load`` began, whether it succeeded or not.
        capacity: Adapters that may be loaded at once.
        itemsize: Bytes of a parameter.
        stats: Gets the counters of ``adapters`` and the times in ``adapter_wait_seconds``.
    """

    load: Callable[[AdapterSource, int], Awaitable[None]]
    unload: Callable[[int], Awaitable[None]]
    capacity: int
    itemsize: int
    stats: EngineStats
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)
    _waiting: list[_Waiting] = field(default_factory=list)
    _num_loaded: int = 0

    @asynccontextmanager
    async def use(self, source: AdapterSource | None) -> AsyncIterator[int | None]:
        """Hold an adapter: its number, or None for none. Waits until there is room for it and it is loaded."""
        if source is None:
            yield None
            return
        began = time.monotonic()
        entry = await self._take(source)
        try:
            if entry.loading is not None:
                await asyncio.shield(entry.loading)
            self.stats.adapter_wait_seconds.observe(STEP_SECONDS_BOUNDS, time.monotonic() - began)
            yield entry.number
        finally:
            self._release(entry)

    def check_integrity(self) -> None:
        """Check the invariants.

        Raises:
            AssertionError: If one does not hold.
        """
        numbers = [entry.number for entry in self._entries.values()]
        facts = {
            "the capacity": len(self._entries) <= self.capacity,
            "one number for each": len(set(numbers)) == len(numbers),
            "users": all(entry.users >= 0 for entry in self._entries.values()),
            "the first that waits has no room": not self._waiting or not self._has_room(self._waiting[0].source),
            "resident": self.stats.adapters.resident
            == sum(entry.loading is None for entry in self._entries.values()),
        }
        wrong = [name for name, holds in facts.items() if not holds]
        if wrong:
            raise AssertionError(f"the adapters are wrong in: {', '.join(wrong)}")

    async def _take(self, source: AdapterSource) -> _Entry:
        """Wait for room; the entry has one more user."""
        waiting = _Waiting(source, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        try:
            return await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.cancelled():
                self._grant()  # those who were behind it may have been blocked by it
            else:
                self._release(waiting.granted.result())
            raise

    def _grant(self) -> None:
        """Let those go on for whom there is room, in the order of arrival."""
        still: list[_Waiting] = []
        for waiting in self._waiting:
            if waiting.granted.cancelled():
                continue
            is_blocked = any(other.passed >= MAX_PASSED for other in still)
            if is_blocked or not self._has_room(waiting.source):
                still.append(waiting)
                continue
            for other in still:
                other.passed += 1
            waiting.granted.set_result(self._enter(waiting.source))
        self._waiting = still

    def _has_room(self, source: AdapterSource) -> bool:
        if source.digest in self._entries or len(self._entries) < self.capacity:
            return True
        return any(_is_idle(entry) for entry in self._entries.values())

    def _enter(self, source: AdapterSource) -> _Entry:
        entry = self._entries.get(source.digest)
        if entry is None:
            evicted = self._evict() if len(self._entries) >= self.capacity else None
            self._num_loaded += 1
            entry = _Entry(self._num_loaded, source.num_parameters * self.itemsize)
            self._entries[source.digest] = entry
            self.stats.adapters.misses += 1
            entry.loading = asyncio.create_task(self._load(source, entry, evicted))
            entry.loading.add_done_callback(_retrieve)
        else:
            self.stats.adapters.hits += 1
        self._entries.move_to_end(source.digest)
        entry.users += 1
        return entry

    def _evict(self) -> _Entry:
        digest = next(digest for digest, entry in self._entries.items() if _is_idle(entry))
        entry = self._entries.pop(digest)
        self.stats.adapters.resident -= 1
        self.stats.adapters.resident_bytes -= entry.nbytes
        self.stats.adapters.evictions += 1
        return entry

    async def _load(self, source: AdapterSource, entry: _Entry, evicted: _Entry | None) -> None:
        began = time.monotonic()
        try:
            if evicted is not None:
                await self.unload(evicted.number)
            await self.load(source, entry.number)
        except BaseException:
            with suppress(Exception):  # a part of the workers may hold it
                await self.unload(entry.number)
            del self._entries[source.digest]
            self._grant()
            raise
        entry.loading = None
        self.stats.adapters.resident += 1
        self.stats.adapters.resident_bytes += entry.nbytes
        self.stats.adapters.load_seconds.observe(LOAD_SECONDS_BOUNDS, time.monotonic() - began)
        self._grant()

    def _release(self, entry: _Entry) -> None:
        entry.users -= 1
        if entry.users == 0:
            self._grant()


def _is_idle(entry: _Entry) -> bool:
    return entry.users == 0 and entry.loading is None


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at a load's error: all who waited for it may be gone."""
    if not task.cancelled():
        task.exception()
