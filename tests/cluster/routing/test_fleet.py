"""A router's view of the replicas, with reports that are late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.cluster.routing.fleet import Fleet


def loads(fleet: Fleet) -> dict[str, int]:
    return {id_: state.load for id_, state in fleet.states.items()}


def test_a_report_brings_the_load_and_what_is_warm() -> None:
    fleet = Fleet()
    fleet.update({"a": 4, "b": 4})
    fleet.report("a", load=4, warm={"x"}, stored={"y"})
    assert loads(fleet) == {"a": 4, "b": 0}
    assert fleet.states["a"].is_full
    assert (fleet.states["a"].warm, fleet.states["a"].stored) == ({"x"}, {"y"})


def test_requests_count_before_the_replica_has_answered() -> None:
    fleet = Fleet()
    fleet.update({"a": 4, "b": 4})
    fleet.sent("a")
    fleet.sent("a")
    assert loads(fleet) == {"a": 2, "b": 0}
    fleet.contacted("a", 5)  # another router had sent some
    assert loads(fleet) == {"a": 5, "b": 0}


def test_a_report_from_before_a_contact_does_not_hide_it() -> None:
    fleet = Fleet()
    fleet.update({"a": 4})
    fleet.contacted("a", 3)
    fleet.report("a", load=0, warm={"x"}, stored=())
    assert loads(fleet) == {"a": 3}
    assert fleet.states["a"].warm == {"x"}
    fleet.report("a", load=1, warm={"x"}, stored=())
    assert loads(fleet) == {"a": 1}


def test_replicas_that_left_are_forgotten() -> None:
    fleet = Fleet()
    fleet.update({"a": 4, "b": 4})
    fleet.contacted("a", 2)
    fleet.update({"b": 8, "c": 8})
    fleet.sent("a")
    fleet.contacted("a", 3)
    fleet.report("a", load=3, warm=(), stored=())
    assert loads(fleet) == {"b": 0, "c": 0}
    assert {state.capacity for state in fleet.states.values()} == {8}
    fleet.update({"a": 8})
    fleet.report("a", load=1, warm=(), stored=())  # the first one of the new replica with this id
    assert loads(fleet) == {"a": 1}


@given(
    st.lists(st.tuples(st.sampled_from(["sent", "contacted", "report"]), st.sampled_from("ab"), st.integers(0, 5)))
)
def test_the_last_contact_or_the_second_report_after_it_counts(events: list[tuple[str, str, int]]) -> None:
    fleet = Fleet()
    fleet.update({"a": 4, "b": 4})
    expected = {"a": 0, "b": 0}
    fresh = {"a": False, "b": False}
    for kind, id_, load in events:
        if kind == "sent":
            fleet.sent(id_)
            expected[id_] += 1
        elif kind == "contacted":
            fleet.contacted(id_, load)
            expected[id_], fresh[id_] = load, True
        else:
            fleet.report(id_, load=load, warm=(), stored=())
            expected[id_], fresh[id_] = (expected[id_] if fresh[id_] else load), False
        assert loads(fleet) == expected
