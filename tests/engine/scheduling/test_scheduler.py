from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import ErrorCode, FinishReason, SamplingParams, SoftPromptSource
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present


def make(num_blocks: int = 64, block_size: int = 4, seqs: int = 8, budget: int = 16, length: int = 128) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(blocks, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length)


def source(num: int, digest: str, *, is_key_values: bool) -> SoftPromptSource:
    return SoftPromptSource(digest=digest, num_virtual_tokens=num, is_key_values=is_key_values, path="/nowhere")


def seq(name: str, length: int, max_tokens: int = 4, soft_prompt: SoftPromptSource | None = None) -> Sequence:
    return make_sequence(name, list(range(length)), SamplingParams(max_tokens=max_tokens), soft_prompt)


def finish_step(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the engine does after a step, with made-up tokens."""
    for chunk in plan.chunks:
        if chunk.seq is not None and chunk.samples:
            chunk.seq.token_ids.append(1)
            if chunk.seq.num_new_tokens == chunk.seq.request.params.max_tokens:
                scheduler.finish(chunk.seq, FinishReason.LENGTH)
    scheduler.check_integrity()


def test_budgets_are_checked() -> None:
    with pytest.raises(ValueError, match="max_num_seqs 9 must be"):
        make(seqs=9, budget=8)


def test_decodes_come_first_and_prefill_is_cut_into_chunks() -> None:
    scheduler = make(budget=10)
    scheduler.add(seq("short", 3))
    finish_step(scheduler, scheduler.schedule(0.0))
    scheduler.add(seq("long", 25))
    plans = []
    for _ in range(3):
        plan = scheduler.schedule(0.0)
        plans.append([(present(chunk.seq).request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks])
        finish_step(scheduler, plan)
    assert plans == [
        [("short", 3, 1), ("long", 0, 9)],
        [("short", 4, 1), ("long", 9, 9)],
        [("short", 5, 1), ("long", 18, 7)],
    ]


def test_key_values_are_copied_in_the_step_that_uses_them() -> None:
    scheduler = make()
    soft_prompt = source(6, "kv", is_key_values=True)
    scheduler.add(seq("a", 3, soft_prompt=soft_prompt))
    scheduler.add(seq("b", 2, soft_prompt=soft_prompt))
    plan = scheduler.schedule(0.0)
    assert [run.key for run in plan.key_value_fills] == ["kv"]
    assert [(present(chunk.seq).request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [
        ("a", 6, 3),
        ("b", 6, 2),
    ]
    assert len(plan.block_copies) == 2
    assert plan.num_distinct_prompts == 1


def test_embeddings_are_computed_once_and_followed_a_step_later() -> None:
    scheduler = make(budget=16)
    soft_prompt = source(6, "rows", is_key_values=False)
    scheduler.add(seq("a", 3, soft_prompt=soft_prompt))
    scheduler.add(seq("b", 3, soft_prompt=soft_prompt))
    scheduler.add(seq("bare", 3))
    first = scheduler.schedule(0.0)
    assert [(chunk.run is not None, chunk.num_tokens) for chunk in first.chunks] == [(True, 6), (False, 3)]
    finish_step(scheduler, first)
    second = scheduler.schedule(0.0)
    assert [present(chunk.seq).request_id for chunk in second.chunks] == ["bare", "a", "b"]
    assert scheduler.block_manager.stats.run_loads == 1


def test_followers_need_not_wait_for_full_blocks() -> None:
    scheduler = make(budget=16)
    scheduler.add(seq("a", 3, soft_prompt=source(8, "rows", is_key_values=False)))
    plan = scheduler.schedule(0.0)
    assert [(chunk.run is not None, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [
        (True, 0, 8),
        (False, 8, 3),
    ]


def test_long_soft_prompts_are_computed_in_chunks() -> None:
    scheduler = make(budget=8)
    scheduler.add(seq("a", 3, soft_prompt=source(18, "rows", is_key_values=False)))
    spans = []
    for _ in range(4):
        plan = scheduler.schedule(0.0)
        spans += [(chunk.start, chunk.num_tokens) for chunk in plan.chunks]
        finish_step(scheduler, plan)
    assert spans[:4] == [(0, 8), (8, 8), (16, 2), (18, 3)]


def test_newest_is_preempted_and_computed_again() -> None:
    scheduler = make(num_blocks=6, seqs=4)
    for name in ("old", "new"):
        scheduler.add(seq(name, 7, max_tokens=12))
    done: list[str] = []
    for _ in range(60):
        before = set(scheduler._seqs)
        finish_step(scheduler, scheduler.schedule(0.0))
        done += sorted(before - set(scheduler._seqs))
        if not scheduler.has_work:
            break
    assert scheduler.num_preemptions > 0
    assert done == ["old", "new"]


@pytest.mark.parametrize(
    ("length", "max_tokens", "virtual", "message"),
    [
        (100, 29, 0, "0 virtual tokens, 100 text tokens and 29 new ones are more than the 128 positions"),
        (100, 9, 20, "20 virtual tokens, 100 text tokens and 9 new ones are more than the 128 positions"),
        (30, 12, 0, "needs 11 key/value blocks; the cache has 10 in all"),
    ],
)
def test_a_sequence_that_never_fits_is_refused_with_the_numbers(
    length: int, max_tokens: int, virtual: int, message: str
) -> None:
    scheduler = make(num_blocks=10)
    soft_prompt = source(virtual, "x", is_key_values=True) if virtual else None
    with pytest.raises(ValueError, match=message):
        scheduler.add(seq("a", length, max_tokens, soft_prompt))
    assert not scheduler.has_work


def test_same_id_twice_is_refused() -> None:
    scheduler = make()
    scheduler.add(seq("a", 3))
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(seq("a", 3))


def test_abort_releases_everything() -> None:
    scheduler = make()
    soft_prompt = source(6, "rows", is_key_values=False)
    scheduler.add(seq("waits", 3, soft_prompt=soft_prompt))
    scheduler.add(seq("runs", 20))
    scheduler.schedule(0.0)
    assert present(scheduler.abort("waits")).end_reason is FinishReason.ABORT
    assert present(scheduler.abort("runs")).end_reason is FinishReason.ABORT
    assert scheduler.abort("runs") is None
    scheduler.check_integrity()
    assert scheduler.block_manager.num_available == 64
    assert scheduler.schedule(0.0).is_empty


def test_waiting_soft_prompts_release_blocks_that_the_first_needs() -> None:
    scheduler = make(num_blocks=6, budget=32, seqs=4)
    for index in range(3):
        scheduler.add(seq(f"s{index}", 9, 2, source(6, f"d{index}", is_key_values=False)))
    for _ in range(40):
        finish_step(scheduler, scheduler.schedule(0.0))
    assert not scheduler.has_work


@given(
    lengths=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(-2, 2)), min_size=2, max_size=12),
    data=st.data(),
)
def test_all_finish_if_the_blocks_hold_only_one(lengths: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Seven blocks of four: one sequence may need them all, and many run at once until they do."""
    scheduler = make(num_blocks=7, seqs=6, budget=8)
    for index, (length, max_tokens, priority) in enumerate(lengths):
        prompt = data.draw(st.integers(0, 2))
        scheduler.add(
            make_sequence(
                f"s{index}",
                [index] * min(length, 25 - 3 * prompt - max_tokens),
                SamplingParams(max_tokens=max_tokens),
                source(3 * prompt, f"d{prompt}", is_key_values=index % 2 == 0) if prompt else None,
                salt=f"tenant{index % 3}",
                priority=priority,
            )
        )
    for _ in range(2000):
        if not scheduler.has_work:
            break
        first = min(scheduler.running, key=lambda seq: (seq.urgency, seq.turn), default=None)
        plan = scheduler.schedule(0.0)
        assert first is None or first.block_table
        assert not plan.is_empty
        finish_step(scheduler, plan)
    assert not scheduler.has_work
    assert scheduler.block_manager.num_available == 7


def test_the_least_urgent_is_preempted_though_it_came_first() -> None:
    scheduler = make(num_blocks=6, seqs=4)
    for name, priority in (("calm", 1), ("urgent", 0), ("also urgent", 0)):
        scheduler.add(make_sequence(name, [1] * 7, SamplingParams(max_tokens=12), salt=name, priority=priority))
        finish_step(scheduler, scheduler.schedule(0.0))
    preempted = []
    while scheduler.has_work:
        running = list(scheduler.running)
        finish_step(scheduler, scheduler.schedule(0.0))
        preempted += [seq.request_id for seq in running if seq in scheduler.waiting]
    assert preempted[0] == "calm"
    assert "urgent" not in preempted


def test_urgent_passes_the_waiting_and_order_of_arrival_decides_within_a_soft_prompt() -> None:
    scheduler = make(seqs=1)
    for name, priority in (("a", 0), ("b", 0), ("later", 7), ("urgent", -3)):
        scheduler.add(make_sequence(name, [1], SamplingParams(max_tokens=1), priority=priority))
    order: list[str] = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        order += [present(chunk.seq).request_id for chunk in plan.chunks]
        finish_step(scheduler, plan)
    assert order == ["urgent", "a", "b", "later"]


def test_a_hot_soft_prompt_or_tenant_starves_no_other() -> None:
    scheduler = make(num_blocks=200, seqs=1, budget=16)
    hot = [source(4, f"hot{index}", is_key_values=True) for index in range(10)]
    for index in range(100):
        scheduler.add(
            make_sequence(f"hot{index}", [1] * 4, SamplingParams(max_tokens=4), hot[index % 10], salt="hot")
        )
    for index in range(3):
        scheduler.add(make_sequence(f"calm{index}", [1] * 4, SamplingParams(max_tokens=4), hot[0], salt="calm"))
    order: list[str] = []
    while scheduler.has_work:
        before = set(scheduler._seqs)
        finish_step(scheduler, scheduler.schedule(0.0))
        order += before - set(scheduler._seqs)
    # A turn is worth 16 tokens, which is two sequences: for the tenant, and within it for the soft prompt.
    assert order[:8] == ["hot0", "hot10", "calm0", "calm1", "hot1", "hot11", "calm2", "hot2"]


def test_the_least_urgent_runs_while_urgent_ones_never_end() -> None:
    scheduler = make(num_blocks=20, seqs=2, budget=4, length=16)
    scheduler.add(make_sequence("calm", [1] * 8, SamplingParams(max_tokens=8), salt="calm", priority=100))
    for step in range(200):
        if "calm" not in scheduler._seqs:
            break
        for half in range(2):
            scheduler.add(make_sequence(f"{step}.{half}", [2] * 8, SamplingParams(max_tokens=4), priority=-100))
        finish_step(scheduler, scheduler.schedule(0.0))
    assert "calm" not in scheduler._seqs


def test_deadlines_end_only_sequences_that_have_not_run() -> None:
    scheduler = make(num_blocks=6, seqs=2)
    params = SamplingParams(max_tokens=12)
    for name, timeout in (
        ("runs", 5.0),
        ("also runs", 5.0),
        ("waits", 5.0),
        ("waits longer", 9.0),
        ("for ever", None),
    ):
        scheduler.add(make_sequence(name, [1] * 7, params, arrival=10.0, timeout=timeout))
    assert scheduler.expire(14.9) == []
    finish_step(scheduler, scheduler.schedule(14.9))
    assert [seq.first_run for seq in scheduler.running] == [14.9, 14.9]
    late = scheduler.expire(15.0)
    assert [(seq.request_id, seq.end_reason) for seq in late] == [("waits", ErrorCode.WAIT_TIMEOUT)]
    while scheduler.num_preemptions == 0:
        finish_step(scheduler, scheduler.schedule(16.0))
    assert scheduler.expire(18.9) == []
    assert [seq.request_id for seq in scheduler.expire(100.0)] == ["waits longer"]
    scheduler.check_integrity()
    assert scheduler.num_sequences == 3


def test_undone_chunks_are_computed_again() -> None:
    scheduler = make(budget=32)
    scheduler.add(seq("writer", 9))
    scheduler.add(seq("reader", 10))
    plan = scheduler.schedule(0.0)
    assert [chunk.start for chunk in plan.chunks] == [0, 8]
    scheduler.undo(plan)
    for chunk in plan.chunks:
        scheduler.preempt(present(chunk.seq))
    scheduler.check_integrity()
    plan = scheduler.schedule(0.0)
    assert [(present(chunk.seq).request_id, chunk.start) for chunk in plan.chunks] == [("writer", 0), ("reader", 8)]
    finish_step(scheduler, plan)


@pytest.mark.parametrize("is_key_values", [True, False])
def test_a_soft_prompt_that_was_not_filled_is_freed_with_its_last_reference(is_key_values: bool) -> None:
    scheduler = make(budget=32)
    soft_prompt = source(6, "bad", is_key_values=is_key_values)
    for name in ("a", "b"):
        scheduler.add(seq(name, 3, soft_prompt=soft_prompt))
    scheduler.add(seq("bare", 3))
    plan = scheduler.schedule(0.0)
    (run,) = scheduler.block_manager.runs.values()
    holders = scheduler.holders(run)
    assert [holder.request_id for holder in holders] == ["a", "b"]
    scheduler.undo(plan)
    for holder in holders:
        scheduler.finish(holder, ErrorCode.FAILED)
    assert scheduler.block_manager.runs == {}
    scheduler.preempt(scheduler.running[0])
    scheduler.check_integrity()
    assert [present(chunk.seq).request_id for chunk in scheduler.schedule(0.0).chunks] == ["bare"]
