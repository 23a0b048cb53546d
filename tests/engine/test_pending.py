from __future__ import annotations

from server.engine.pending import PendingSequences
from server.engine.sequence import Sequence
from server.engine.types import SamplingParams


def make_seq(name: str, timeout: float | None = None) -> Sequence:
    return Sequence(name, [1], SamplingParams(), arrival=100.0, timeout=timeout)


def test_a_sequence_goes_on_when_the_last_of_its_things_has_come() -> None:
    pending = PendingSequences()
    both, one, other = make_seq("both"), make_seq("one"), make_seq("other")
    pending.add(both, ["file", "grammar"])
    pending.add(one, ["file"])
    pending.add(other, ["another"])
    assert pending.waiting_for("file") == [both, one]
    assert pending.supply("file") == [one]
    assert pending.supply("file") == []
    assert "both" in pending
    assert pending.supply("grammar") == [both]
    assert len(pending) == 1
    assert pending.remove("other") is other
    assert pending.remove("other") is None
    assert len(pending) == 0


def test_deadlines() -> None:
    pending = PendingSequences()
    assert pending.next_deadline is None
    late, later, patient = make_seq("late", 1.0), make_seq("later", 2.0), make_seq("patient")
    for seq in (patient, later, late):
        pending.add(seq, ["file"])
    assert pending.next_deadline == 101.0
    assert pending.expire(100.9) == []
    assert pending.expire(101.0) == [late]
    assert pending.supply("file") == [patient, later]
