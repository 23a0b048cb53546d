"""Which soft prompts the workers hold in host memory. Pure logic; one object in the scheduler's process decides.

Every worker obeys the same commands in the same order, so all ranks hold the same soft prompts. A soft prompt that a
request uses, or that is pinned, stays; the others are kept up to a budget, and the least recently used go first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from server.engine.stats import EngineTierStats
from server.engine.types import SoftPromptSource

MAX_UNCLAIMED = 64
"""Computed soft prompts that no request has used yet and that the budget does not count; usually one use follows."""


class State(Enum):
    """How far a soft prompt has come."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Read:
    """Read a soft prompt of keys and values from its file, beside the steps."""

    ticket: int
    source: SoftPromptSource


@dataclass(slots=True)
class Reported:
    """What a worker, or all of them together, did since the last report.

    Attributes:
        loaded: By ticket: workers that hold it now, bytes of all of them, and the longest time in seconds.
        failed: By ticket: why a worker cannot hold it.
    """

    loaded: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, other: Reported) -> None:
        """Add another worker's report."""
        for ticket, (count, nbytes, seconds) in other.loaded.items():
            own = self.loaded.get(ticket, (0, 0, 0.0))
            self.loaded[ticket] = own[0] + count, own[1] + nbytes, max(own[2], seconds)
        self.failed.update(other.failed)


@dataclass(slots=True)
class _Entry:
    ticket: int
    state: State = State.LOADING
    users: int = 0
    nbytes: int = 0
    num_workers: int = 0
    seconds: float = 0.0


class Residency:
    """The soft prompts in the workers' host memory, by identity.

    Args:
        num_workers: Workers; each of them reports every soft prompt.
        budget_bytes: Bytes, over all workers, of soft prompts that no request and no pin uses.
    """

    def __init__(self, num_workers: int, budget_bytes: int) -> None:
        self._num_workers = num_workers
        self._budget = budget_bytes
        self._entries: dict[str, _Entry] = {}
        self._identities: dict[int, str] = {}
        self._unclaimed: OrderedDict[str, None] = OrderedDict()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._idle_bytes = 0
        self._pinned: set[str] = set()
        self._num_tickets = 0
        self._reads: list[Read] = []
        self._drops: list[int] = []
        self._resident = self._resident_bytes = 0
        self._hits = self._misses = self._evictions = 0
        self._load_seconds = Histogram.empty(LOAD_SECONDS_BOUNDS)

    @property
    def stats(self) -> EngineTierStats:
        """The current state, and counters since the start."""
        return EngineTierStats(
            resident=self._resident,
            resident_bytes=self._resident_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            load_seconds=self._load_seconds,
        )

    def state(self, identity: str) -> State:
        """How far a soft prompt has come."""
        entry = self._entries.get(identity)
        return State.ABSENT if entry is None else entry.state

    def ticket(self, identity: str) -> int:
        """The number by which the workers know a soft prompt that is not absent."""
        return self._entries[identity].ticket

    def use(self, source: SoftPromptSource) -> bool:
        """Refer to a soft prompt until ``release``, and read it if it is a file of keys and values.

        Returns:
            Whether there is an entry to release: False for embeddings that have not been computed.
        """
        entry = self._entries.get(source.identity)
        if entry is None:
            self._misses += 1
            if not source.is_key_values:
                return False
            entry = self._new_entry(source.identity)
            self._reads.append(Read(entry.ticket, source))
        else:
            self._hits += 1
        self._refer(source.identity, entry)
        return True

    def release(self, identity: str) -> None:
        """Release one reference."""
        entry = self._entries[identity]
        entry.users -= 1
        if entry.users == 0:
            self._unused(identity, entry)

    def pin(self, source: SoftPromptSource) -> None:
        """Keep a soft prompt until ``unpin``; repeated calls have no effect, nor has one for absent embeddings."""
        if source.identity not in self._pinned and self.use(source):
            self._pinned.add(source.identity)

    def unpin(self, identity: str) -> None:
        """End a pin, if there is one."""
        if identity in self._pinned:
            self._pinned.discard(identity)
            self.release(identity)

    def discard(self, identity: str) -> None:
        """Drop a soft prompt that no request and no pin uses."""
        entry = self._entries.get(identity)
        if entry is not None and entry.state is State.RESIDENT and not entry.users:
            self._fail(identity, entry)

    def begin_computing(self, identity: str) -> int | None:
        """Expect a soft prompt that a request computes.

        Returns:
            The ticket under which the workers keep it; None if it is resident, or another request computes it.
        """
        return None if identity in self._entries else self._new_entry(identity).ticket

    def abandon(self, ticket: int) -> None:
        """The request that should have computed this ended before."""
        identity = self._identities.get(ticket)
        if identity is not None:
            self._fail(identity, self._entries[identity])

    def report(self, reported: Reported) -> None:
        """Take over what the workers did."""
        for ticket, (count, nbytes, seconds) in reported.loaded.items():
            identity = self._identities.get(ticket)
            if identity is None or ticket in reported.failed:
                continue
            entry = self._entries[identity]
            entry.num_workers += count
            entry.nbytes += nbytes
            entry.seconds = max(entry.seconds, seconds)
            if entry.state is State.LOADING and entry.num_workers == self._num_workers:
                self._loaded(identity, entry)
        for ticket in reported.failed:
            identity = self._identities.get(ticket)
            if identity is not None:
                self._fail(identity, self._entries[identity])

    def take_commands(self) -> tuple[list[Read], list[int]]:
        """The files to read and the tickets to drop, for all workers; drops come first."""
        reads, drops = self._reads, self._drops
        self._reads, self._drops = [], []
        return reads, drops

    def check_integrity(self) -> None:
        """Check the invariants.

        Raises:
            AssertionError: If one does not hold.
        """
        waiting = set(self._unclaimed) | set(self._idle)
        resident = {key for key, entry in self._entries.items() if entry.state is State.RESIDENT}
        unused = {key for key in resident if not self._entries[key].users}
        facts = {
            "unused soft prompts are idle or unclaimed, once": waiting == unused
            and len(waiting) == len(self._unclaimed) + len(self._idle),
            "idle bytes": self._idle_bytes == sum(self._entries[key].nbytes for key in self._idle),
            "the budget": self._idle_bytes <= self._budget,
            "unclaimed": len(self._unclaimed) <= MAX_UNCLAIMED,
            "resident": self._resident == len(resident),
            "resident bytes": self._resident_bytes == sum(self._entries[key].nbytes for key in resident),
            "pins are users": all(self._entries[key].users > 0 for key in self._pinned),
            "tickets": self._identities
            == {e.ticket: key for key, e in self._entries.items() if e.state is not State.FAILED},
            "failed ones have users": all(e.users for e in self._entries.values() if e.state is State.FAILED),
        }
        wrong = [name for name, holds in facts.items() if not holds]
        if wrong:
            raise AssertionError(f"the residency is wrong in: {', '.join(wrong)}")

    def _new_entry(self, identity: str) -> _Entry:
        self._num_tickets += 1
        entry = self._entries[identity] = _Entry(self._num_tickets)
        self._identities[entry.ticket] = identity
        return entry

    def _refer(self, identity: str, entry: _Entry) -> None:
        entry.users += 1
        if identity in self._unclaimed:
            del self._unclaimed[identity]
        elif identity in self._idle:
            del self._idle[identity]
            self._idle_bytes -= entry.nbytes

    def _loaded(self, identity: str, entry: _Entry) -> None:
        entry.state = State.RESIDENT
        self._resident += 1
        self._resident_bytes += entry.nbytes
        self._load_seconds.observe(LOAD_SECONDS_BOUNDS, entry.seconds)
        if entry.users == 0:
            self._unclaimed[identity] = None
            if len(self._unclaimed) > MAX_UNCLAIMED:
                oldest, _ = self._unclaimed.popitem(last=False)
                self._make_idle(oldest, self._entries[oldest])

    def _unused(self, identity: str, entry: _Entry) -> None:
        if entry.state is State.RESIDENT:
            self._make_idle(identity, entry)
        elif entry.state is State.FAILED:  # the next use reads it again
            del self._entries[identity]

    def _make_idle(self, identity: str, entry: _Entry) -> None:
        self._idle[identity] = None
        self._idle_bytes += entry.nbytes
        while self._idle_bytes > self._budget:
            oldest, _ = self._idle.popitem(last=False)
            evicted = self._entries[oldest]
            self._idle_bytes -= evicted.nbytes
            self._evictions += 1
            self._forget(evicted)
            del self._entries[oldest]

    def _fail(self, identity: str, entry: _Entry) -> None:
        self._forget(entry)
        entry.state = State.FAILED
        if identity in self._unclaimed:
            del self._unclaimed[identity]
        elif identity in self._idle:
            del self._idle[identity]
            self._idle_bytes -= entry.nbytes
        if identity in self._pinned:
            self._pinned.discard(identity)
            entry.users -= 1
        if entry.users == 0:
            del self._entries[identity]

    def _forget(self, entry: _Entry) -> None:
        """Let the workers drop an entry."""
        if entry.state is State.RESIDENT:
            self._resident -= 1
            self._resident_bytes -= entry.nbytes
        del self._identities[entry.ticket]
        self._reads = [read for read in self._reads if read.ticket != entry.ticket]
        self._drops.append(entry.ticket)
