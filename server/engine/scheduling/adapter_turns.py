"""The adapters of waiting sequences whose turn has come. Pure logic.

A sequence whose adapters are not in memory waits, and later ones may start before it. They may use adapters that
other sequences hold, but take no room from it. When the cost of those that overtook it reaches a limit, no later
sequence starts before it. Only running sequences and reads then keep it from its room, and both end. Sequences behind
it that hold adapters and do not run release them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prompt_store.histogram import Histogram
from server.engine.scheduling.adapter_memory import AdapterMemory, Hold
from server.engine.scheduling.fair_queue import FairQueue
from server.engine.scheduling.sequence import Sequence
from server.engine.stats import STEP_SECONDS_BOUNDS
from server.engine.types import AdapterSource

READ_AHEAD = 4
"""Sequences beyond the free slots whose adapters are read."""


def adapters_of(seq: Sequence) -> list[AdapterSource]:
    """The adapters of a sequence and its followers; one may be there several times."""
    return [adapter for member in seq.members if (adapter := member.request.adapter) is not None]


@dataclass(slots=True)
class _Turn:
    since: float
    num_overtaken: int = 0
    is_observed: bool = False


class AdapterTurns:
    """Gives waiting sequences their adapters, in the order of their turns.

    Args:
        memory: The adapters in memory; None if none are served.
        waiting: The waiting sequences.
        max_overtaken: Cost of later sequences that start before one that waits for its adapters.

    Attributes:
        lacks_room: Whether the last call of ``hold`` found no room, and no earlier sequence waits for it.
        wait_seconds: From the turn of a sequence with adapters until it held them, over ``STEP_SECONDS_BOUNDS``.
    """

    def __init__(self, memory: AdapterMemory | None, waiting: FairQueue, *, max_overtaken: int) -> None:
        self.wait_seconds = Histogram.empty(STEP_SECONDS_BOUNDS)
        self.lacks_room = False
        self._memory = memory
        self._waiting = waiting
        self._max_overtaken = max_overtaken
        self._turns: dict[str, _Turn] = {}
        """Of the sequences with adapters that had a turn and have not ended."""
        self._with_adapters: set[str] = set()
        """Sequences with adapters that have not ended."""
        self._blocked: dict[str, _Turn] = {}
        """Of the sequences that wait for their adapters in this step."""
        self._first_without_room: str | None = None
        """The sequence in this step behind which no other may take room."""

    @property
    def memory(self) -> AdapterMemory | None:
        """The adapters in memory."""
        return self._memory

    @property
    def is_reading(self) -> bool:
        """Whether an adapter is being read, so that a later step has more to do."""
        return self._memory is not None and self._memory.is_reading

    def check(self, seq: Sequence) -> None:
        """Refuse a sequence whose adapters can never be held together.

        Raises:
            ValueError: If they cannot.
        """
        adapters = adapters_of(seq)
        if adapters and self._memory is None:
            raise ValueError("this engine serves no adapters")
        if adapters and self._memory is not None:
            self._memory.check(adapters)

    def refusal_of(self, seq: Sequence) -> str | None:
        """Why ``check`` refuses a sequence; None if it does not."""
        try:
            self.check(seq)
        except ValueError as error:
            return str(error)
        return None

    def add(self, seq: Sequence) -> None:
        """Note a new sequence."""
        if adapters_of(seq):
            self._with_adapters.add(seq.request_id)

    def begin(self) -> None:
        """Begin a step: sequences are passed to ``hold`` from the first turn on."""
        self._blocked = {}
        self._first_without_room = None
        self.lacks_room = False

    def hold(self, seq: Sequence, now: float) -> bool:
        """Hold the adapters of a sequence whose turn has come, or make it wait.

        It may be called again for the same sequence after others have released theirs.

        Args:
            seq: The sequence, taken from the waiting ones.
            now: Seconds of the engine's clock.

        Returns:
            Whether all are held and in memory.
        """
        adapters = adapters_of(seq)
        if not adapters or self._memory is None:
            return True
        name = seq.request_id
        if self._first_without_room == name:
            self._first_without_room = None
        may_take_room = self._first_without_room is None
        state = self._memory.acquire(name, adapters, may_take_room=may_take_room)
        if state is Hold.NO_ROOM and may_take_room and self._release_later():
            state = self._memory.acquire(name, adapters, may_take_room=True)
        self.lacks_room = state is Hold.NO_ROOM and may_take_room
        turn = self._turns.setdefault(name, _Turn(now))
        if state is Hold.READY:
            if not turn.is_observed:  # a preempted sequence comes again
                self.wait_seconds.observe(STEP_SECONDS_BOUNDS, now - turn.since)
                turn.is_observed = True
            self._blocked.pop(name, None)
            return True
        self._blocked[name] = turn
        if state is not Hold.READING and may_take_room:
            self._first_without_room = name
        return False

    @property
    def may_overtake(self) -> bool:
        """Whether a sequence may start before those that wait for their adapters in this step."""
        return all(turn.num_overtaken < self._max_overtaken for turn in self._blocked.values())

    def start(self, seq: Sequence) -> None:
        """Charge a sequence that starts to those that it overtakes."""
        for turn in self._blocked.values():
            turn.num_overtaken += seq.cost
        own = self._turns.get(seq.request_id)
        if own is not None:
            own.num_overtaken = 0

    def release(self, seq: Sequence) -> bool:
        """Release the adapters of a sequence that ended, was preempted or waits; returns whether it held any."""
        if seq.end_reason is not None:
            self._turns.pop(seq.request_id, None)
            self._with_adapters.discard(seq.request_id)
        return self._memory is not None and self._memory.release(seq.request_id)

    def read_ahead(self, now: float) -> list[Sequence]:
        """Read the adapters of the next sequences, which have no slot yet. After the last ``hold`` of a step.

        Args:
            now: As of ``hold``.

        Returns:
            The sequences, taken from the waiting ones.
        """
        taken: list[Sequence] = []
        while self._with_adapters and len(taken) < READ_AHEAD and self.may_overtake:
            if self._first_without_room is not None:
                break
            seq = self._waiting.take()
            if seq is None:
                break
            taken.append(seq)
            self.hold(seq, now)
        return taken

    def users(self, adapter: str) -> list[Sequence]:
        """The waiting sequences that need an adapter, whether or not their turn has come."""
        return [seq for seq in self._waiting if any(one.identity == adapter for one in adapters_of(seq))]

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Check that the running sequences hold their adapters, and what ``AdapterMemory`` checks.

        Raises:
            AssertionError: If something does not hold.
        """
        if self._memory is None:
            return
        needed = {seq.request_id: adapters_of(seq) for seq in running}
        for name, adapters in needed.items():
            if adapters and not self._memory.is_held(name):
                raise AssertionError(f"{name} runs without its adapters")
        self._memory.check_integrity(needed | {seq.request_id: adapters_of(seq) for seq in self._waiting.returned})

    def _release_later(self) -> bool:
        """Release the adapters of waiting sequences whose turn comes later; False if none held any."""
        released = [self.release(seq) for seq in self._waiting.returned]
        return any(released)
