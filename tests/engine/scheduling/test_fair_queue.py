"""The bounds that server/engine/scheduling/fair_queue.py states, and its order in small examples."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduling.fair_queue import FairQueue
from server.engine.scheduling.sequence import Sequence
from server.engine.types import MIN_PRIORITY, SamplingParams, SoftPromptSource
from tests.support.engine.sequences import make_sequence

TENANTS, PROMPTS, LARGEST = 3, 3, 40


def make_seq(name: str, cost: int, tenant: str = "", prompt: str = "", priority: int = 0) -> Sequence:
    source = (
        SoftPromptSource(digest=prompt, num_virtual_tokens=1, is_key_values=True, path="/nowhere") if prompt else None
    )
    return make_sequence(name, [0], SamplingParams(max_tokens=cost - 1), source, salt=tenant, priority=priority)


def serve(queue: FairQueue) -> Sequence | None:
    seq = queue.take()
    if seq is not None:
        queue.serve(seq)
    queue.check_integrity()
    return seq


def names(queue: FairQueue) -> list[str]:
    found = []
    while (seq := serve(queue)) is not None:
        found.append(seq.request_id)
    return found


@pytest.mark.parametrize(("quantum", "aging"), [(0, 1), (1, 0)])
def test_needs_a_quantum(quantum: int, aging: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FairQueue(quantum=quantum, aging_tokens=aging)


def test_many_soft_prompts_do_not_multiply_a_tenants_share() -> None:
    queue = FairQueue(quantum=10, aging_tokens=10**6)
    for index in range(4):
        queue.push(make_seq(f"many{index}", 10, "many", f"p{index}"))
        queue.push(make_seq(f"one{index}", 10, "one", "p"))
    assert [name[:-1] for name in names(queue)] == ["many", "one"] * 4


def test_small_sequences_are_not_held_up_by_large_ones() -> None:
    queue = FairQueue(quantum=10, aging_tokens=10**6)
    for index in range(3):
        queue.push(make_seq(f"L{index}", 30, "large"))
    for index in range(9):
        queue.push(make_seq(f"s{index}", 10, "small"))
    assert names(queue) == ["s0", "s1", "L0", "s2", "s3", "s4", "L1", "s5", "s6", "s7", "L2", "s8"]


def test_preempted_sequences_go_first_in_their_order_and_returned_ones_keep_their_turn() -> None:
    queue = FairQueue(quantum=10, aging_tokens=10**6)
    for name in "abcd":
        queue.push(make_seq(name, 10, tenant=name))
    first, second = serve(queue), serve(queue)
    assert first is not None
    assert second is not None
    blocked = queue.take()
    assert blocked is not None
    assert len(queue) == 1
    queue.put_back(blocked)
    queue.resume(second)
    queue.resume(first)
    assert [seq.request_id for seq in queue.returned] == ["a", "b", "c"]
    queue.remove(second)
    assert names(queue) == ["a", "c", "d"]
    assert len(queue) == 0


def test_a_class_that_was_passed_over_long_enough_is_promoted_once() -> None:
    queue = FairQueue(quantum=10, aging_tokens=30)
    for index in range(8):
        queue.push(make_seq(f"u{index}", 10))
    for index in range(2):
        queue.push(make_seq(f"c{index}", 10, priority=5))
    calm = list(queue)[-2]
    assert names(queue) == ["u0", "u1", "u2", "c0", "u3", "u4", "c1", "u5", "u6", "u7"]
    assert (calm.request.priority, calm.urgency) == (5, MIN_PRIORITY)


def test_a_small_quantum_skips_rounds_without_a_sender() -> None:
    queue = FairQueue(quantum=1, aging_tokens=10**6)
    for index in range(100):
        queue.push(make_seq(f"{index}", 10**9 + index, tenant=f"t{index}"))
    assert names(queue) == [str(index) for index in range(100)]


arrivals = st.lists(
    st.one_of(
        st.none(),  # one turn
        st.tuples(st.integers(0, TENANTS - 1), st.integers(0, PROMPTS - 1), st.integers(2, LARGEST)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(steps=arrivals, quantum=st.integers(1, 60), hot=st.integers(0, 40))
def test_tokens_of_others_before_a_turn_are_bounded(
    steps: list[tuple[int, int, int] | None], quantum: int, hot: int
) -> None:
    """For any waiting and arriving sequences; ``hot`` sequences of tenant 0 wait from the beginning."""
    queue = FairQueue(quantum=quantum, aging_tokens=10**9)
    own: dict[str, int] = {}
    others: dict[str, list[int]] = {}
    waiting: list[Sequence] = []
    pushes = [(0, index % PROMPTS, LARGEST) for index in range(hot)]

    def push(tenant: int, prompt: int, cost: int) -> None:
        seq = make_seq(f"s{len(own)}", cost, f"t{tenant}", f"p{prompt}")
        ahead = [other.cost for other in waiting if (other.request.salt, other.flow) == (seq.request.salt, seq.flow)]
        own[seq.request_id] = sum(ahead) + cost
        others[seq.request_id] = [0, 0]
        waiting.append(seq)
        queue.push(seq)

    def turn() -> None:
        served = serve(queue)
        if served is None:
            return
        waiting.remove(served)
        for seq in waiting:
            if seq.request.salt != served.request.salt:
                others[seq.request_id][1] += served.cost
            elif seq.flow != served.flow:
                others[seq.request_id][0] += served.cost
        c = own[served.request_id]
        inner, outer = others[served.request_id]
        inside = (PROMPTS - 1) * (c + quantum + LARGEST)
        assert inner <= inside
        assert outer <= (TENANTS - 1) * (c + inside + quantum + LARGEST)

    for arrival in pushes:
        push(*arrival)
    for step in steps:
        if step is None:
            turn()
        else:
            push(*step)
    while waiting:
        turn()
    assert serve(queue) is None


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.one_of(st.none(), st.tuples(st.integers(-2, 2), st.integers(2, LARGEST))), max_size=120),
    aging=st.integers(1, 200),
)
def test_every_class_is_served_within_its_bound(steps: list[tuple[int, int] | None], aging: int) -> None:
    queue = FairQueue(quantum=10, aging_tokens=aging)
    waiting: list[Sequence] = []
    passed: defaultdict[int, int] = defaultdict(int)
    for number, step in enumerate([*steps, *[None] * len(steps)]):
        if step is not None:
            seq = make_seq(f"s{number}", step[1], priority=step[0])
            if all(other.request.priority != seq.request.priority for other in waiting):
                passed[seq.request.priority] = 0
            waiting.append(seq)
            queue.push(seq)
            continue
        served = serve(queue)
        if served is None:
            continue
        waiting.remove(served)
        for priority in {seq.request.priority for seq in waiting}:
            passed[priority] += served.cost
        passed[served.request.priority] = 0
        assert all(passed[seq.request.priority] < aging + 5 * LARGEST for seq in waiting)
        if served.urgency != MIN_PRIORITY:  # else it was promoted
            assert all(served.request.priority <= seq.request.priority for seq in waiting)
    assert not waiting
