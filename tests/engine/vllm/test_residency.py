"""Which soft prompts the workers hold: the rules one by one, and random histories."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.types import SoftPromptSource
from server.engine.vllm.residency import MAX_UNCLAIMED, Reported, Residency, State


def prefix(name: str) -> SoftPromptSource:
    return SoftPromptSource(digest=name, num_virtual_tokens=3, is_key_values=True, path=f"/{name}")


def rows(name: str) -> SoftPromptSource:
    return SoftPromptSource(digest=name, num_virtual_tokens=3, is_key_values=False, path=f"/{name}")


def loaded(ticket: int, *, workers: int = 1, nbytes: int = 10) -> Reported:
    return Reported(loaded={ticket: (workers, nbytes, 0.01)})


def resident(residency: Residency, name: str, nbytes: int = 10) -> int:
    """Use a prefix, and let one worker report it; returns its ticket."""
    assert residency.use(prefix(name))
    ticket = residency.ticket(name)
    residency.report(loaded(ticket, nbytes=nbytes))
    assert residency.state(name) is State.RESIDENT
    return ticket


def test_a_file_is_read_once_for_all_its_users() -> None:
    residency = Residency(1, 100)
    for _ in range(3):
        assert residency.use(prefix("a"))
    reads, drops = residency.take_commands()
    assert [(read.source.digest, drops) for read in reads] == [("a", [])]
    assert residency.state("a") is State.LOADING
    residency.report(loaded(reads[0].ticket))
    assert residency.state("a") is State.RESIDENT
    assert (residency.stats.hits, residency.stats.misses, residency.stats.loads) == (2, 1, 1)
    assert residency.take_commands() == ([], [])


def test_all_workers_have_to_hold_it() -> None:
    residency = Residency(2, 100)
    residency.use(prefix("a"))
    ticket = residency.ticket("a")
    residency.report(loaded(ticket, nbytes=4))
    assert residency.state("a") is State.LOADING
    residency.report(loaded(ticket, nbytes=6))
    assert residency.state("a") is State.RESIDENT
    assert residency.stats.resident_bytes == 10


def test_reports_of_workers_add_up() -> None:
    reported = Reported(loaded={1: (1, 10, 0.5)}, failed={2: "first"})
    reported.add(Reported(loaded={1: (1, 20, 0.25), 3: (1, 1, 1.0)}, failed={2: "second"}))
    assert reported.loaded == {1: (2, 30, 0.5), 3: (1, 1, 1.0)}
    assert reported.failed.keys() == {2}


def test_the_least_recently_used_is_dropped_beyond_the_budget() -> None:
    residency = Residency(1, 20)
    tickets = {name: resident(residency, name) for name in "abc"}
    residency.take_commands()
    for name in "abc":
        residency.release(name)
    assert residency.take_commands() == ([], [tickets["a"]])
    residency.use(prefix("b"))
    residency.release("b")
    resident(residency, "d")
    residency.release("d")
    assert residency.take_commands()[1] == [tickets["c"]]
    assert residency.stats.evictions == 2
    assert residency.state("a") is State.ABSENT


def test_used_and_pinned_soft_prompts_stay_whatever_the_budget() -> None:
    residency = Residency(1, 0)
    resident(residency, "used")
    residency.pin(prefix("pinned"))
    residency.pin(prefix("pinned"))
    residency.report(loaded(residency.ticket("pinned")))
    assert {residency.state("used"), residency.state("pinned")} == {State.RESIDENT}
    residency.unpin("pinned")
    residency.unpin("pinned")
    residency.unpin("never pinned")
    assert residency.state("pinned") is State.ABSENT
    assert residency.state("used") is State.RESIDENT


def test_embeddings_cannot_be_used_before_they_are_computed() -> None:
    residency = Residency(1, 100)
    assert not residency.use(rows("a"))
    residency.pin(rows("a"))
    assert residency.state("a") is State.ABSENT
    ticket = residency.begin_computing("a")
    assert ticket is not None
    assert residency.begin_computing("a") is None
    assert residency.use(rows("a"))
    residency.report(loaded(ticket))
    assert residency.state("a") is State.RESIDENT


def test_computed_soft_prompts_outlive_a_budget_of_nothing_until_their_first_use() -> None:
    residency = Residency(1, 0)
    tickets = []
    for index in range(MAX_UNCLAIMED + 1):
        ticket = residency.begin_computing(str(index))
        assert ticket is not None
        tickets.append(ticket)
        residency.report(loaded(ticket))
    assert residency.take_commands()[1] == tickets[:1]
    assert residency.use(rows("1"))
    residency.release("1")
    assert residency.state("1") is State.ABSENT


def test_an_abandoned_computation_fails_those_that_wait() -> None:
    residency = Residency(1, 100)
    ticket = residency.begin_computing("a")
    assert ticket is not None
    residency.use(rows("a"))
    residency.abandon(ticket)
    assert residency.state("a") is State.FAILED
    residency.release("a")
    assert residency.state("a") is State.ABSENT
    residency.abandon(ticket)


def test_a_failure_is_forgotten_with_its_last_user() -> None:
    residency = Residency(2, 100)
    residency.pin(prefix("a"))
    residency.use(prefix("a"))
    ticket = residency.ticket("a")
    residency.report(loaded(ticket))
    residency.report(Reported(failed={ticket: "unreadable"}))
    assert residency.state("a") is State.FAILED
    reads, drops = residency.take_commands()
    assert (reads, drops) == ([], [ticket])  # the file need not be read any more
    residency.report(Reported(failed={ticket: "again"}))
    residency.release("a")
    assert residency.use(prefix("a"))
    assert residency.state("a") is State.LOADING
    residency.check_integrity()


def test_what_is_in_use_is_not_discarded() -> None:
    residency = Residency(1, 100)
    ticket = resident(residency, "a")
    residency.discard("a")
    residency.discard("never seen")
    assert residency.state("a") is State.RESIDENT
    residency.release("a")
    residency.discard("a")
    assert residency.state("a") is State.ABSENT
    assert residency.take_commands()[1] == [ticket]
    assert residency.stats.evictions == 0
    residency.check_integrity()


def test_a_broken_invariant_is_found() -> None:
    residency = Residency(1, 100)
    resident(residency, "a")
    residency._idle_bytes = 7
    with pytest.raises(AssertionError, match="idle bytes"):
        residency.check_integrity()


NAMES = st.sampled_from("abcdef")


class Histories(RuleBasedStateMachine):
    """Users, pins, computations and reports in any order, against what the workers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(2, 25)
        self.uses: list[str] = []
        self.pending: list[tuple[int, int]] = []
        """Tickets that a worker has to report."""
        self.computing: list[int] = []
        self.held: list[set[int]] = [set(), set()]

    @rule(name=NAMES, is_prefix=st.booleans())
    def use(self, name: str, is_prefix: bool) -> None:
        if self.residency.use(prefix(name) if is_prefix else rows(name)):
            self.uses.append(name)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.residency.release(self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1))))

    @rule(name=NAMES, is_prefix=st.booleans())
    def pin(self, name: str, is_prefix: bool) -> None:
        self.residency.pin(prefix(name) if is_prefix else rows(name))

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        self.residency.unpin(name)

    @rule(name=NAMES)
    def begin(self, name: str) -> None:
        ticket = self.residency.begin_computing(name)
        if ticket is not None:
            self.computing.append(ticket)

    @rule(name=NAMES)
    def discard(self, name: str) -> None:
        self.residency.discard(name)

    @precondition(lambda self: self.computing)
    @rule(data=st.data(), is_done=st.booleans())
    def end(self, data: st.DataObject, is_done: bool) -> None:
        ticket = self.computing.pop(data.draw(st.integers(0, len(self.computing) - 1)))
        if is_done:
            self.pending += [(worker, ticket) for worker in (0, 1)]
        else:
            self.residency.abandon(ticket)

    @rule()
    def step(self) -> None:
        reads, drops = self.residency.take_commands()
        for worker in (0, 1):
            self.held[worker] -= set(drops)
            self.pending += [(worker, read.ticket) for read in reads]
        self.pending = [(worker, ticket) for worker, ticket in self.pending if ticket not in drops]

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), fails=st.booleans(), nbytes=st.integers(1, 9))
    def report(self, data: st.DataObject, fails: bool, nbytes: int) -> None:
        worker, ticket = self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1)))
        if fails:
            self.residency.report(Reported(failed={ticket: "reason"}))
        else:
            self.held[worker].add(ticket)
            self.residency.report(loaded(ticket, nbytes=nbytes))

    @invariant()
    def holds(self) -> None:
        self.residency.check_integrity()
        for name in "abcdef":
            if self.residency.state(name) is State.RESIDENT:
                assert all(self.residency.ticket(name) in held for held in self.held)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
