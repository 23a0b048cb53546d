from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.constraints import Constraint, ConstraintKind
from server.engine.sampling.grammar_queue import GrammarQueue


def constraint(text: str) -> Constraint:
    return Constraint(kind=ConstraintKind.REGEX, text=text)


def test_tenants_take_turns_and_each_keeps_its_order() -> None:
    queue = GrammarQueue()
    for text in ("a1", "a2", "a3", "b1", "b2"):
        queue.add(constraint(text), text[0])
    queue.add(constraint("b1"), "a")  # it keeps its place
    taken = []
    while (turn := queue.take()) is not None:
        taken.append(turn[0].text)
    assert taken == ["a1", "b1", "a2", "b2", "a3"]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9), st.sampled_from("xyz")),
        st.tuples(st.just("discard"), st.integers(0, 9), st.none()),
        st.tuples(st.just("take"), st.none(), st.none()),
    )
)


@given(operations)
def test_it_holds_what_was_added_and_a_tenant_waits_for_one_turn_of_each_other(
    steps: list[tuple[str, int, str]],
) -> None:
    queue = GrammarQueue()
    model: dict[Constraint, str] = {}
    passed: dict[str, set[str]] = {}
    for step, number, tenant in steps:
        own = constraint(str(number))
        if step == "add":
            queue.add(own, tenant)
            model.setdefault(own, tenant)
        elif step == "discard":
            assert queue.discard(own) is (model.pop(own, None) is not None)
        else:
            turn = queue.take()
            assert (turn is None) is (not model)
            if turn is not None:
                assert model.pop(turn[0]) == turn[1]
                passed[turn[1]] = set()
                for other in set(model.values()) - {turn[1]}:
                    assert turn[1] not in passed.setdefault(other, set())
                    passed[other].add(turn[1])
        for other in list(passed):
            if other not in model.values():
                del passed[other]
        assert len(queue) == len(model)
        for name in "xyz":
            assert queue.count(name) == sum(owner == name for owner in model.values())
