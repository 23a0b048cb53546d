"""Sequences that cannot be scheduled yet, because something of theirs is being read or compiled. Pure logic."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from server.engine.scheduling.sequence import Sequence


class PendingSequences:
    """Waits for several things at once: a sequence is let go when the last of its own has come.

    What comes is looked for by itself: thousands may wait, each for something else.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Sequence, set[Hashable]]] = {}
        self._by_need: dict[Hashable, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @property
    def next_deadline(self) -> float | None:
        """When the first of them expires; None if none does."""
        deadlines = (seq.deadline for seq, _ in self._waiting.values() if seq.deadline is not None)
        return min(deadlines, default=None)

    def add(self, seq: Sequence, needs: Iterable[Hashable]) -> None:
        """Let a sequence wait for things, at least one."""
        missing = set(needs)
        self._waiting[seq.request_id] = (seq, missing)
        for need in missing:
            self._by_need.setdefault(need, {})[seq.request_id] = None

    def waiting_for(self, need: Hashable) -> list[Sequence]:
        """The sequences that wait for a thing, in the order of their coming."""
        return [self._waiting[request_id][0] for request_id in self._by_need.get(need, ())]

    def supply(self, need: Hashable) -> list[Sequence]:
        """A thing has come: returns the sequences that waited for nothing else, which are let go."""
        ready = []
        for request_id in self._by_need.pop(need, ()):
            seq, missing = self._waiting[request_id]
            missing.discard(need)
            if not missing:
                del self._waiting[request_id]
                ready.append(seq)
        return ready

    def remove(self, request_id: str) -> Sequence | None:
        """Take one out; None if it is not here."""
        seq, missing = self._waiting.pop(request_id, (None, ()))
        for need in missing:
            others = self._by_need[need]
            del others[request_id]
            if not others:
                del self._by_need[need]
        return seq

    def expire(self, now: float) -> list[Sequence]:
        """Take out those whose deadline has come."""
        late = [seq for seq, _ in self._waiting.values() if seq.deadline is not None and seq.deadline <= now]
        for seq in late:
            self.remove(seq.request_id)
        return late
