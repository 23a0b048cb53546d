"""Packed adapters in host memory, between the files and a device with memory of its own."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from server.engine.adapters.weights import AdapterWeights
from server.engine.stats import EngineTierStats
from server.engine.types import AdapterSource


class HostCache:
    """Keeps adapters that were read, up to a budget; the least recently used are evicted first.

    ``read`` is called from one thread at a time, ``stats`` from any.

    Args:
        pack: Reads an adapter's files into host memory.
        place: Copies a packed adapter to the device, and waits for the copy.
        budget_bytes: Host memory for adapters.
    """

    def __init__(
        self,
        pack: Callable[[AdapterSource], AdapterWeights],
        place: Callable[[AdapterWeights], AdapterWeights],
        *,
        budget_bytes: int,
    ) -> None:
        self._pack, self._place, self._budget = pack, place, budget_bytes
        self._entries: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._nbytes = 0
        self._stats = EngineTierStats(load_seconds=Histogram.empty(LOAD_SECONDS_BOUNDS))

    @property
    def stats(self) -> EngineTierStats:
        """The current state, and counters since the start."""
        return self._stats

    @property
    def digests(self) -> list[str]:
        """Digests of the adapters that are kept, the last used first."""
        return list(reversed(list(self._entries)))

    def read(self, source: AdapterSource) -> AdapterWeights:
        """An adapter on the device; its files are read unless it is cached.

        Raises:
            Exception: As the functions that read and copy it.
        """
        return self._place(self._packed(source))

    def _packed(self, source: AdapterSource) -> AdapterWeights:
        packed = self._entries.get(source.identity)
        if packed is not None:
            self._entries.move_to_end(source.identity)
            self._stats.hits += 1
            return packed
        self._stats.misses += 1
        started = time.perf_counter()
        packed = self._pack(source)
        self._stats.load_seconds.observe(LOAD_SECONDS_BOUNDS, time.perf_counter() - started)
        if packed.nbytes <= self._budget:
            while self._nbytes + packed.nbytes > self._budget:
                _, evicted = self._entries.popitem(last=False)
                self._nbytes -= evicted.nbytes
                self._stats.evictions += 1
            self._entries[source.identity] = packed
            self._nbytes += packed.nbytes
        self._stats.resident, self._stats.resident_bytes = len(self._entries), self._nbytes
        return packed
