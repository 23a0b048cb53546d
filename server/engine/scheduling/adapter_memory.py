"""Which adapters are in a device's memory, and for whom. Pure logic: no torch, no clock, no files.

An adapter in memory is *reading* until its file has been read, and then *resident*. Both count towards the budget. It
stays while a sequence holds it. Resident adapters that no sequence holds are *idle*: they are evicted, the least
recently used first, when another one needs their room.

A pinned adapter is not idle. It gives way in one case only: if no sequence holds an adapter and none is being read,
but a sequence has no room, that sequence could otherwise never run. The pin remains, and the adapter is read again
when there is room without evicting a pinned or a held one.

The size of an adapter that was never read is estimated from its number of parameters. An adapter that turns out to be
larger than its room is dropped, unless idle ones can be evicted. It is then acquired with its actual size, so the
memory of resident adapters never exceeds the budget.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from server.engine.types import AdapterSource

MAX_READS = 8
"""Adapters that are read at once, or wait for their turn at the disk: a bound of what is read ahead."""

MAX_KNOWN_SIZES = 4096
"""Number of adapters whose actual size is kept after they were evicted."""


class Hold(Enum):
    """What ``AdapterMemory.acquire`` achieved."""

    READY = auto()
    """The adapters are held and resident."""
    READING = auto()
    """The adapters are held, and some are being read."""
    BUSY = auto()
    """Nothing is held, because enough adapters are being read."""
    NO_ROOM = auto()
    """Nothing is held, because what other sequences hold leaves too little room."""


class AdapterFiles(Protocol):
    """Reads adapters, and keeps their weights."""

    def start(self, source: AdapterSource) -> None:
        """Start to read an adapter; ``AdapterMemory.end_read`` is called when that has ended."""
        ...

    def drop(self, identity: str) -> None:
        """Free the weights of an adapter that was read."""
        ...


@dataclass(slots=True)
class MemoryStats:
    """Counters since the start, as of ``EngineTierStats``."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(slots=True)
class _Entry:
    source: AdapterSource
    nbytes: int
    is_resident: bool = False
    holders: set[str] = field(default_factory=set)


class AdapterMemory:
    """Room for adapters, held by sequences or pins.

    Args:
        files: Reads what is missing.
        budget_bytes: Bytes of all adapters in memory.
        bytes_per_parameter: For the estimated size of an adapter that was never read.
        held_bytes: Bytes of the adapters that sequences hold, where a device limits that; None for no further limit.
        max_reads: Number of adapters that are read at once.
    """

    def __init__(
        self,
        files: AdapterFiles,
        *,
        budget_bytes: int,
        bytes_per_parameter: int,
        held_bytes: int | None = None,
        max_reads: int = MAX_READS,
    ) -> None:
        self.stats = MemoryStats()
        self._files = files
        self._budget = budget_bytes
        self._held_budget = budget_bytes if held_bytes is None else min(held_bytes, budget_bytes)
        self._bytes_per_parameter = bytes_per_parameter
        self._max_reads = max_reads
        self._entries: dict[str, _Entry] = {}
        self._held: dict[str, tuple[_Entry, ...]] = {}
        self._idle: OrderedDict[str, _Entry] = OrderedDict()
        self._pinned: dict[str, AdapterSource] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._num_reading = 0
        self._used_bytes = 0
        self._idle_bytes = 0
        self._held_bytes = 0

    # State

    @property
    def is_reading(self) -> bool:
        """Whether an adapter is being read, for a sequence or a pin."""
        return self._num_reading > 0

    @property
    def is_used(self) -> bool:
        """Whether a sequence holds an adapter."""
        return bool(self._held)

    @property
    def num_resident(self) -> int:
        """Adapters that have been read and not evicted."""
        return len(self._entries) - self._num_reading

    @property
    def resident_bytes(self) -> int:
        """Bytes of those adapters."""
        return sum(entry.nbytes for entry in self._entries.values() if entry.is_resident)

    def entries(self) -> Iterator[tuple[str, int, bool]]:
        """The adapters in memory or being read: digest, number of sequences that hold it, whether it was read."""
        for entry in self._entries.values():
            yield entry.source.digest, len(entry.holders), entry.is_resident

    def check(self, sources: Iterable[AdapterSource]) -> None:
        """Refuse the adapters of a sequence if they never fit.

        Raises:
            ValueError: If they do not.
        """
        needed = sum(self._size(source) for source in _distinct(sources).values())
        if needed > self._held_budget:
            raise ValueError(
                f"its adapters need {needed} bytes of memory; the engine has {self._held_budget} for adapters "
                "(--adapter-host-memory, and --adapter-device-memory on GPUs)"
            )

    # Sequences

    def acquire(self, name: str, sources: Iterable[AdapterSource], *, may_take_room: bool) -> Hold:
        """Hold all adapters of a sequence, or none, and start to read those that are missing.

        Args:
            name: Identifies the sequence.
            sources: Its adapters.
            may_take_room: Whether idle adapters may be held, or evicted. If not, nothing is held but what other
                sequences hold: an earlier sequence waits for the rest.
        """
        held = self._held.get(name)
        if held is not None:
            return _state_of(held)
        wanted = _distinct(sources)
        present = [entry for identity in wanted if (entry := self._entries.get(identity)) is not None]
        missing = [source for identity, source in wanted.items() if identity not in self._entries]
        if not may_take_room and (missing or not all(entry.holders for entry in present)):
            return Hold.NO_ROOM
        if missing and self._num_reading and self._num_reading + len(missing) > self._max_reads:
            return Hold.BUSY
        # The others are held before room is made, so that they are not evicted.
        for entry in present:
            self._refer(entry, name)
        needed = sum(self._size(source) for source in missing)
        if self._held_bytes + needed > self._held_budget or not self._make_room(needed):
            for entry in present:
                self._unrefer(entry, name)
            return Hold.NO_ROOM
        self.stats.hits += len(present)
        self.stats.misses += len(missing)
        held = *present, *(self._start(source) for source in missing)
        for entry in held[len(present) :]:
            self._refer(entry, name)
        self._held[name] = held
        return _state_of(held)

    def is_held(self, name: str) -> bool:
        """Whether a sequence holds all its adapters, and all are resident."""
        return name in self._held and _state_of(self._held[name]) is Hold.READY

    def release(self, name: str) -> bool:
        """Release what a sequence holds; returns whether it held anything."""
        held = self._held.pop(name, ())
        for entry in held:
            self._unrefer(entry, name)
        return bool(held)

    def end_read(self, identity: str, nbytes: int | None) -> str | None:
        """End the reading of an adapter.

        Sequences that hold it release everything if it could not be read, or has no room.

        Args:
            identity: The adapter.
            nbytes: Its actual size; None if it could not be read.

        Returns:
            Why it never fits; None if it does, or could not be read.
        """
        entry = self._entries[identity]
        if nbytes is not None:
            self._remember(identity, nbytes)
            self._resize(entry, nbytes)
            self._evict_idle(0)
        self._num_reading -= 1
        has_room = self._used_bytes <= self._budget and self._held_bytes <= self._held_budget
        if nbytes is not None and has_room:
            entry.is_resident = True
            self._retire(entry)
            return None
        for name in tuple(entry.holders):
            self.release(name)
        self._remove(entry)
        if nbytes is not None:
            self._files.drop(identity)
        never_fits = nbytes is not None and nbytes > self._held_budget
        if nbytes is None or never_fits:
            self._pinned.pop(identity, None)
        if not never_fits:
            return None
        return f"its {nbytes} bytes are more than the {self._held_budget} that the engine has for adapters"

    # Pins

    def pin(self, source: AdapterSource) -> None:
        """Keep an adapter in memory until ``unpin``, and read it when there is room; repeated calls have no effect.

        Raises:
            ValueError: If it never fits.
        """
        self.check([source])
        self._pinned[source.identity] = source
        entry = self._entries.get(source.identity)
        if entry is not None and source.identity in self._idle:
            self._leave_idle(entry)
        self.read_pins()

    def unpin(self, source: AdapterSource) -> None:
        """End a pin, if there is one."""
        if self._pinned.pop(source.identity, None) is not None and source.identity in self._entries:
            self._retire(self._entries[source.identity])

    def is_pinned(self, source: AdapterSource) -> bool:
        """Whether an adapter is pinned, in memory or not."""
        return source.identity in self._pinned

    def read_pins(self) -> None:
        """Start to read pinned adapters that are not in memory, as far as there is room."""
        for identity, source in self._pinned.items():
            if self._num_reading >= self._max_reads:
                return
            if identity not in self._entries and self._evict_idle(self._size(source)):
                self._start(source)

    # Private methods

    def _size(self, source: AdapterSource) -> int:
        entry = self._entries.get(source.identity)
        if entry is not None:
            return entry.nbytes
        return self._sizes.get(source.identity, source.num_parameters * self._bytes_per_parameter)

    def _remember(self, identity: str, nbytes: int) -> None:
        self._sizes[identity] = nbytes
        self._sizes.move_to_end(identity)
        if len(self._sizes) > MAX_KNOWN_SIZES:
            self._sizes.popitem(last=False)

    def _start(self, source: AdapterSource) -> _Entry:
        entry = self._entries[source.identity] = _Entry(source, self._size(source))
        self._used_bytes += entry.nbytes
        self._num_reading += 1
        self._files.start(source)
        return entry

    def _refer(self, entry: _Entry, name: str) -> None:
        if not entry.holders:
            self._held_bytes += entry.nbytes
            if entry.source.identity in self._idle:
                self._leave_idle(entry)
        entry.holders.add(name)

    def _unrefer(self, entry: _Entry, name: str) -> None:
        entry.holders.remove(name)
        if not entry.holders:
            self._held_bytes -= entry.nbytes
            self._retire(entry)

    def _retire(self, entry: _Entry) -> None:
        """Make an adapter idle if it is resident, and neither held nor pinned."""
        identity = entry.source.identity
        if entry.is_resident and not entry.holders and identity not in self._pinned:
            self._idle[identity] = entry
            self._idle_bytes += entry.nbytes

    def _leave_idle(self, entry: _Entry) -> None:
        del self._idle[entry.source.identity]
        self._idle_bytes -= entry.nbytes

    def _resize(self, entry: _Entry, nbytes: int) -> None:
        self._used_bytes += nbytes - entry.nbytes
        if entry.holders:
            self._held_bytes += nbytes - entry.nbytes
        entry.nbytes = nbytes

    def _make_room(self, needed: int) -> bool:
        """Make room for some bytes; False, with nothing changed, if that is not possible now."""
        if self._evict_idle(needed):
            return True
        if self._num_reading or self._held:
            return False
        for identity in self._pinned:
            entry = self._entries.get(identity)
            if entry is not None and not entry.holders:
                self._evict(entry)
            if self._evict_idle(needed):
                return True
        return False

    def _evict_idle(self, needed: int) -> bool:
        """Evict idle adapters until some bytes are free; False, with nothing changed, if they are too few."""
        if self._used_bytes - self._idle_bytes + needed > self._budget:
            return False
        while self._used_bytes + needed > self._budget:
            entry = next(iter(self._idle.values()))
            self._leave_idle(entry)
            self._evict(entry)
        return True

    def _evict(self, entry: _Entry) -> None:
        self._remove(entry)
        self._files.drop(entry.source.identity)
        self.stats.evictions += 1

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.source.identity]
        self._used_bytes -= entry.nbytes

    # Checks, for tests and debug mode

    def check_integrity(self, users: Mapping[str, Iterable[AdapterSource]]) -> None:
        """Check all invariants, given the sequences that may hold adapters.

        Raises:
            AssertionError: If one does not hold.
        """
        for name, held in self._held.items():
            wanted = sorted(_distinct(users.get(name, ())))
            _expect(sorted(entry.source.identity for entry in held) == wanted, f"{name} holds other adapters")
            _expect(all(name in entry.holders for entry in held), f"an adapter does not know that {name} holds it")
        for identity, entry in self._entries.items():
            names = {name for name, held in self._held.items() if entry in held}
            _expect(entry.holders == names, f"adapter {identity} has holders that do not hold it")
            is_idle = entry.is_resident and not names and identity not in self._pinned
            _expect(is_idle == (identity in self._idle), f"adapter {identity} is idle and used")
        entries = self._entries.values()
        _expect(self._num_reading == sum(not entry.is_resident for entry in entries), "reads are counted wrongly")
        _expect(self._used_bytes == sum(entry.nbytes for entry in entries), "used bytes are counted wrongly")
        _expect(self._idle_bytes == sum(one.nbytes for one in self._idle.values()), "idle bytes are counted wrongly")
        _expect(self._held_bytes == sum(e.nbytes for e in entries if e.holders), "held bytes are counted wrongly")
        _expect(self._used_bytes <= self._budget, "adapters take more than their budget")
        _expect(self._held_bytes <= self._held_budget, "held adapters take more than their budget")


def _distinct(sources: Iterable[AdapterSource]) -> dict[str, AdapterSource]:
    return {source.identity: source for source in sources}


def _state_of(held: tuple[_Entry, ...]) -> Hold:
    return Hold.READY if all(entry.is_resident for entry in held) else Hold.READING


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
