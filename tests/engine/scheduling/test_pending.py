from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduling.pending import PendingSequences
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SamplingParams
from tests.support.engine.sequences import make_sequence


def make_seq(name: str, timeout: float | None = None) -> Sequence:
    return make_sequence(name, [1], SamplingParams(), arrival=100.0, timeout=timeout)


def test_a_sequence_is_ready_when_all_its_needs_are_supplied() -> None:
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
    assert PendingSequences().next_deadline is None
    pending = PendingSequences()
    late, later, patient = make_seq("late", 1.0), make_seq("later", 2.0), make_seq("patient")
    for seq in (patient, later, late):
        pending.add(seq, ["file"])
    assert pending.next_deadline == 101.0
    assert pending.expire(100.9) == []
    assert pending.expire(101.0) == [late]
    assert pending.supply("file") == [patient, later]


needs = st.sampled_from(["file", "grammar", "another"])


@given(
    st.lists(
        st.tuples(st.just("add"), st.sets(needs, min_size=1))
        | st.tuples(st.just("supply"), needs)
        | st.tuples(st.just("remove"), st.integers(0, 9)),
        max_size=30,
    )
)
def test_no_sequence_is_lost_or_ready_too_early(operations: list[tuple[str, object]]) -> None:
    pending, waiting = PendingSequences(), dict[str, set[object]]()
    for number, (what, value) in enumerate(operations):
        if what == "add":
            assert isinstance(value, set)
            pending.add(make_seq(f"{number}"), value)
            waiting[f"{number}"] = set(value)
        elif what == "supply":
            last = [name for name, missing in waiting.items() if missing == {value}]
            assert [seq.request_id for seq in pending.supply(value)] == last
            waiting = {name: missing - {value} for name, missing in waiting.items() if name not in last}
        else:
            seq = pending.remove(f"{value}")
            assert (seq is None) == (waiting.pop(f"{value}", None) is None)
        assert len(pending) == len(waiting)
        for need in ("file", "grammar", "another"):
            names = [seq.request_id for seq in pending.waiting_for(need)]
            assert names == [name for name, missing in waiting.items() if need in missing]
