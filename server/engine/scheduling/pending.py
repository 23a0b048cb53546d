"""Sequences that cannot be scheduled yet, because a soft prompt is being read or a grammar compiled. Pure logic."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator

from server.engine.scheduling.sequence import Sequence


class PendingSequences:
    """Sequences that wait for one or more things; a sequence is ready when all of them are supplied.

    Sequences are indexed by need, because thousands may wait, each for something else.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Sequence, set[Hashable]]] = {}
        self._by_need: dict[Hashable, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[tuple[Sequence, Collection[Hashable]]]:
        """The sequences in order of arrival, with what each waits for."""
        return iter(self._waiting.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline; None if no sequence has one."""
        deadlines = (seq.deadline for seq, _ in self._waiting.values() if seq.deadline is not None)
        return min(deadlines, default=None)

    def add(self, seq: Sequence, needs: Iterable[Hashable]) -> None:
        """Add a sequence that waits for at least one thing."""
        missing = set(needs)
        self._waiting[seq.request_id] = (seq, missing)
        for need in missing:
            self._by_need.setdefault(need, {})[seq.request_id] = None

    def waiting_for(self, need: Hashable) -> list[Sequence]:
        """The sequences that wait for a thing, in order of arrival."""
        return [self._waiting[request_id][0] for request_id in self._by_need.get(need, ())]

    def supply(self, need: Hashable) -> list[Sequence]:
        """Supply a thing; returns, and removes, the sequences that wait for nothing else."""
        ready = []
        for request_id in self._by_need.pop(need, ()):
            seq, missing = self._waiting[request_id]
            missing.discard(need)
            if not missing:
                del self._waiting[request_id]
                ready.append(seq)
        return ready

    def remove(self, request_id: str) -> Sequence | None:
        """Remove and return a sequence; None if it does not wait here."""
        seq, missing = self._waiting.pop(request_id, (None, ()))
        for need in missing:
            others = self._by_need[need]
            del others[request_id]
            if not others:
                del self._by_need[need]
        return seq

    def expire(self, now: float) -> list[Sequence]:
        """Remove and return the sequences whose deadline has passed."""
        late = [seq for seq, _ in self._waiting.values() if seq.deadline is not None and seq.deadline <= now]
        for seq in late:
            self.remove(seq.request_id)
        return late
