"""The fair order of waiting sequences. A pure data structure: no torch, no clock, no randomness.

Three levels, outermost first:

1. *Priority classes.* The most urgent class with waiting sequences goes first. To prevent starvation, each waiting
   class counts the tokens that are served from other classes. At ``aging_tokens`` its next sequence is promoted: it
   goes first, and belongs to the most urgent class from then on. The classes of the service tier ``batch`` come after
   all others and are not promoted.
2. *Tenants* of a class share by deficit round robin (Shreedhar and Varghese, 1995): each turn gives a tenant
   ``quantum`` tokens, and it sends sequences while its deficit counter covers their cost.
3. *Soft prompts* of a tenant share that tenant's turns in the same way. They are below tenants, so that a tenant does
   not get a larger share by using many soft prompts.

A sequence's cost is its text tokens plus its maximum number of new tokens. Virtual tokens are not included, because
they are computed once for all sequences. The maximum is charged, not the actual number, because the cost has to be
known before the sequence runs.

The bounds are in tokens of cost, where q is the quantum and L the largest cost of one sequence.
tests/engine/scheduling/test_fair_queue.py checks them.

- Within a tenant of p active soft prompts, a sequence that has C tokens of its own soft prompt up to its own end
  waits for less than ``I = (p - 1) * (C + q + L)`` tokens of the tenant's other soft prompts.
- Within a class of t active tenants it waits for less than ``(t - 1) * (C + I + q + L)`` tokens of other tenants.
  Neither depends on how many sequences the others have waiting, nor on how many soft prompts the other tenants use.
- With k waiting classes, each has a sequence served before ``aging_tokens + k * L`` tokens of other classes are.

Sequences that had their turn before (preempted, or waiting for their soft prompt) go first in their class and are not
charged again; there are at most ``max_num_seqs`` of them.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain
from typing import Generic, Protocol, TypeVar

from server.engine.scheduling.sequence import Sequence
from server.engine.types import MAX_PRIORITY, MIN_PRIORITY


class _Member(Protocol):
    deficit: int

    def next_cost(self) -> int:
        """Cost of the sequence that it sends next, in tokens."""
        ...


M = TypeVar("M", bound=_Member)


class _Ring(Generic[M]):
    """Deficit round robin over members that have waiting sequences; the first member has the turn."""

    def __init__(self, quantum: int) -> None:
        self.members: OrderedDict[str, M] = OrderedDict()
        self._quantum = quantum

    def add(self, key: str, member: M) -> None:
        self.members[key] = member
        if len(self.members) == 1:
            self._begin_turn()

    def discard(self, key: str) -> None:
        had_turn = next(iter(self.members)) == key
        del self.members[key]
        if had_turn and self.members:
            self._begin_turn()

    def current(self) -> M:
        """The member that sends next; the same until a sequence is sent or removed."""
        num_passed = 0
        while (member := self._first()).deficit < member.next_cost():
            self.members.move_to_end(next(iter(self.members)))
            self._begin_turn()
            num_passed += 1
            if num_passed == len(self.members):
                self._skip_rounds()
        return member

    def _first(self) -> M:
        return next(iter(self.members.values()))

    def _begin_turn(self) -> None:
        self._first().deficit += self._quantum

    def _skip_rounds(self) -> None:
        """Add the quanta of all rounds in which no member can send, so that a small quantum needs no loop."""
        missing = min(member.next_cost() - member.deficit for member in self.members.values())
        rounds = max(0, -(-missing // self._quantum) - 1)
        for member in self.members.values():
            member.deficit += rounds * self._quantum


class _Flow:
    """The sequences of one soft prompt of one tenant, in order of arrival."""

    def __init__(self) -> None:
        self.deficit = 0
        self.seqs: deque[Sequence] = deque()

    def next_cost(self) -> int:
        return self.seqs[0].cost


class _Tenant:
    """One tenant's soft prompts with waiting sequences."""

    def __init__(self, quantum: int) -> None:
        self.deficit = 0
        self.flows: _Ring[_Flow] = _Ring(quantum)

    def next_cost(self) -> int:
        return self.flows.current().next_cost()


class _Class:
    """Waiting sequences of one urgency.

    Attributes:
        passed_over: Tokens served from other classes since a sequence of this class was served, or began to wait.
        num_taken: Sequences that were taken, and not yet served or put back.
        returned: Sequences that had their turn before, in order of their turns.
        tenants: All other sequences.
    """

    def __init__(self, quantum: int) -> None:
        self.passed_over = 0
        self.num_taken = 0
        self.returned: list[Sequence] = []
        self.tenants: _Ring[_Tenant] = _Ring(quantum)
        self._quantum = quantum

    @property
    def has_waiting(self) -> bool:
        return bool(self.returned or self.tenants.members)

    def push(self, seq: Sequence) -> None:
        tenant = self.tenants.members.get(seq.request.salt)
        flow = tenant.flows.members.get(seq.flow) if tenant else None
        if flow is None:
            flow = _Flow()
            flow.seqs.append(seq)
            if tenant is None:
                tenant = _Tenant(self._quantum)
                tenant.flows.add(seq.flow, flow)
                self.tenants.add(seq.request.salt, tenant)
            else:
                tenant.flows.add(seq.flow, flow)
        else:
            flow.seqs.append(seq)

    def take(self) -> Sequence:
        if self.returned:
            return self.returned.pop(0)
        tenant = self.tenants.current()
        flow = tenant.flows.current()
        seq = flow.seqs[0]
        tenant.deficit -= seq.cost
        flow.deficit -= seq.cost
        self.remove(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """Remove a waiting sequence; a soft prompt or tenant without sequences loses its turn and its deficit."""
        if seq.turn is not None:
            self.returned.remove(seq)
            return
        tenant = self.tenants.members[seq.request.salt]
        flow = tenant.flows.members[seq.flow]
        flow.seqs.remove(seq)
        if not flow.seqs:
            tenant.flows.discard(seq.flow)
        if not tenant.flows.members:
            self.tenants.discard(seq.request.salt)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.returned
        for tenant in self.tenants.members.values():
            yield from chain.from_iterable(flow.seqs for flow in tenant.flows.members.values())


class FairQueue:
    """Waiting sequences in fair order; the module's docstring describes the order and its bounds.

    ``take`` returns one sequence, which is then passed to ``serve`` or ``put_back``. Sequences are pushed and removed
    only while none is taken. Iteration is over all waiting sequences, in arbitrary order.

    Args:
        quantum: Tokens of a turn, at least 1. A smaller quantum is fairer over short times.
        aging_tokens: Tokens served from other classes before a sequence of a waiting class is promoted, at least 1.

    Raises:
        ValueError: If either is less than 1.
    """

    def __init__(self, *, quantum: int, aging_tokens: int) -> None:
        if quantum < 1 or aging_tokens < 1:
            raise ValueError(f"quantum {quantum} and aging_tokens {aging_tokens} have to be at least 1")
        self._quantum = quantum
        self._aging_tokens = aging_tokens
        self._classes: dict[int, _Class] = {}
        self._num_waiting = 0
        self._num_turns = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._classes.values())

    @property
    def returned(self) -> list[Sequence]:
        """Waiting sequences that had their turn before."""
        return [seq for group in self._classes.values() for seq in group.returned]

    @property
    def has_interactive(self) -> bool:
        """Whether a sequence waits that is not of the service tier ``batch``."""
        return any(rank <= MAX_PRIORITY and group.has_waiting for rank, group in self._classes.items())

    def push(self, seq: Sequence) -> None:
        """Add a new sequence, behind those of its tenant and soft prompt."""
        self._class(seq.urgency).push(seq)
        self._num_waiting += 1

    def resume(self, seq: Sequence) -> None:
        """Add a sequence that was served, first in its class, in the order of turns."""
        insort(self._class(seq.urgency).returned, seq, key=_turn)
        self._num_waiting += 1

    def take(self) -> Sequence | None:
        """The sequence whose turn it is; None if none waits. Sets ``turn``, and on promotion ``urgency``."""
        waiting = [(rank, group) for rank, group in self._classes.items() if group.has_waiting]
        if not waiting:
            return None
        due = [
            (-group.passed_over, rank)
            for rank, group in waiting
            if rank <= MAX_PRIORITY and group.passed_over >= self._aging_tokens
        ]
        rank = min(due)[1] if due else min(rank for rank, _ in waiting)
        group = self._classes[rank]
        seq = group.take()
        if due:
            group.passed_over = 0
            seq.urgency = MIN_PRIORITY
            self._drop_if_empty(rank)
        if seq.turn is None:
            seq.turn = self._num_turns
            self._num_turns += 1
        self._class(seq.urgency).num_taken += 1
        self._num_waiting -= 1
        return seq

    def put_back(self, seq: Sequence) -> None:
        """Return a taken sequence that could not be served; no sequence behind it may have been served since."""
        self._classes[seq.urgency].num_taken -= 1
        self.resume(seq)

    def serve(self, seq: Sequence) -> None:
        """Confirm that a taken sequence is served; its tokens are counted in every other waiting class."""
        for rank, group in self._classes.items():
            group.passed_over = 0 if rank == seq.urgency else group.passed_over + seq.cost
        self._classes[seq.urgency].num_taken -= 1
        self._drop_if_empty(seq.urgency)

    def remove(self, seq: Sequence) -> None:
        """Remove a waiting sequence."""
        self._classes[seq.urgency].remove(seq)
        self._drop_if_empty(seq.urgency)
        self._num_waiting -= 1

    def check_integrity(self) -> None:
        """Check all invariants.

        Raises:
            AssertionError: If one does not hold.
        """
        if self._num_waiting != sum(1 for _ in self):
            raise AssertionError("waiting sequences are counted wrongly")
        for rank, group in self._classes.items():
            if group.num_taken or not group.has_waiting:
                raise AssertionError(f"class {rank} is not removed, though it is empty")
            if any(seq.urgency != rank for seq in group):
                raise AssertionError(f"a sequence of another urgency waits in class {rank}")
            turns = [_turn(seq) for seq in group.returned]
            if turns != sorted(set(turns)):
                raise AssertionError(f"returned sequences of class {rank} are out of order: {turns}")
            for tenant in group.tenants.members.values():
                if not tenant.flows.members or not all(flow.seqs for flow in tenant.flows.members.values()):
                    raise AssertionError("a tenant or soft prompt without sequences is not removed")

    def _class(self, rank: int) -> _Class:
        group = self._classes.get(rank)
        if group is None:
            group = self._classes[rank] = _Class(self._quantum)
        return group

    def _drop_if_empty(self, rank: int) -> None:
        group = self._classes[rank]
        if not group.has_waiting and not group.num_taken:
            del self._classes[rank]


def _turn(seq: Sequence) -> int:
    if seq.turn is None:
        raise AssertionError(f"{seq.request_id} had no turn yet")
    return seq.turn
