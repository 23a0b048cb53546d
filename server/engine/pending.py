"""Sequences that cannot be scheduled yet, because something of theirs is being read or compiled. Pure logic."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from server.engine.sequence import Sequence


class PendingSequences:
    """Waits for several things at once: a sequence is let go when the last of its own has come."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Sequence, set[Hashable]]] = {}

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
        self._waiting[seq.request_id] = (seq, set(needs))

    def waiting_for(self, need: Hashable) -> list[Sequence]:
        """The sequences that wait for a thing, in the order of their coming."""
        return [seq for seq, needs in self._waiting.values() if need in needs]

    def supply(self, need: Hashable) -> list[Sequence]:
        """A thing has come: returns the sequences that waited for nothing else, which are let go."""
        ready = []
        for seq, needs in list(self._waiting.values()):
            if need in needs:
                needs.discard(need)
                if not needs:
                    ready.append(self._waiting.pop(seq.request_id)[0])
        return ready

    def remove(self, request_id: str) -> Sequence | None:
        """Take one out; None if it is not here."""
        entry = self._waiting.pop(request_id, None)
        return None if entry is None else entry[0]

    def expire(self, now: float) -> list[Sequence]:
        """Take out those whose deadline has come."""
        late = [seq for seq, _ in self._waiting.values() if seq.deadline is not None and seq.deadline <= now]
        for seq in late:
            del self._waiting[seq.request_id]
        return late
