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


def spans(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(id of the sequence or key of the soft prompt, start, number of positions) of each chunk."""
    return [
        (chunk.seq.request_id if chunk.seq is not None else present(chunk.run).key, chunk.start, chunk.num_tokens)
        for chunk in plan.chunks
    ]


@pytest.mark.parametrize(
    ("num", "start"), [(8, 8), (6, 4), (3, 0)], ids=["aligned", "partial last block", "less than a block"]
)
def test_sequences_start_in_the_step_that_fills_their_soft_prompt(num: int, start: int) -> None:
    scheduler = make(budget=32)
    soft_prompt = source(num, "rows", is_key_values=False)
    scheduler.add(seq("a", 3, soft_prompt=soft_prompt))
    scheduler.add(make_sequence("b", [9, 8, 7], SamplingParams(max_tokens=4), soft_prompt))
    scheduler.add(seq("bare", 3))
    plan = scheduler.schedule(0.0)
    size = num + 3 - start
    assert spans(plan) == [("rows", 0, num), ("a", start, size), ("b", start, size), ("bare", 0, 3)]
    assert plan.block_copies == []
    a, b = (present(chunk.seq) for chunk in plan.chunks[1:3])
    assert a.block_table[: start // 4] == b.block_table[: start // 4]
    assert not {*a.block_table[start // 4 :]} & {*b.block_table[start // 4 :]}
    finish_step(scheduler, plan)
    assert spans(scheduler.schedule(0.0)) == [("a", num + 3, 1), ("b", num + 3, 1), ("bare", 3, 1)]
    assert scheduler.block_manager.stats.run_loads == 1


def test_a_partial_block_that_another_sequence_of_the_step_computes_is_shared_with_its_text() -> None:
    scheduler = make(budget=32)
    soft_prompt = source(6, "rows", is_key_values=False)
    for name in ("a", "b"):
        scheduler.add(seq(name, 3, soft_prompt=soft_prompt))
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [("rows", 0, 6), ("a", 4, 5), ("b", 8, 1)]


def test_a_filled_partial_block_is_copied() -> None:
    scheduler = make(budget=32)
    soft_prompt = source(6, "rows", is_key_values=False)
    scheduler.add(seq("cold", 3, soft_prompt=soft_prompt))
    finish_step(scheduler, scheduler.schedule(0.0))
    scheduler.block_manager.withdraw(list(scheduler.block_manager.findable))  # else the text's block is found again
    scheduler.preempt(scheduler.running[0])
    scheduler.add(make_sequence("warm", [9, 8, 7], SamplingParams(max_tokens=4), soft_prompt))
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [("cold", 6, 4), ("warm", 6, 3)]
    (run,) = scheduler.block_manager.runs.values()
    assert [copied for copied, _ in plan.block_copies] == [run.blocks[1]] * 2
    finish_step(scheduler, plan)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (8, [[("rows", 0, 8)], [("rows", 8, 8)], [("rows", 16, 2), ("a", 16, 5)]]),
        (10, [[("rows", 0, 10)], [("rows", 10, 8)], [("a", 18, 3)]]),  # no room for text behind two virtual tokens
        (11, [[("rows", 0, 11)], [("rows", 11, 7), ("a", 16, 4)], [("a", 20, 1)]]),
        (18, [[("rows", 0, 18)], [("a", 18, 3)]]),
        (21, [[("rows", 0, 18), ("a", 16, 3)], [("a", 19, 2)]]),
    ],
)
def test_long_soft_prompts_are_computed_in_chunks(budget: int, expected: list[list[tuple[str, int, int]]]) -> None:
    scheduler = make(budget=budget)
    scheduler.add(seq("a", 3, soft_prompt=source(18, "rows", is_key_values=False)))
    for want in expected:
        plan = scheduler.schedule(0.0)
        assert spans(plan) == want
        assert len(plan.block_copies) == (want[0][:2] == ("a", 18))
        finish_step(scheduler, plan)


def test_members_of_an_ensemble_compute_or_copy_each_their_partial_block() -> None:
    scheduler = make(budget=64)
    cold, warm = source(6, "cold", is_key_values=False), source(7, "warm", is_key_values=False)
    scheduler.add(seq("first", 1, max_tokens=1, soft_prompt=warm))
    finish_step(scheduler, scheduler.schedule(0.0))
    others = (warm, source(5, "kv", is_key_values=True), source(8, "full", is_key_values=False), None)
    scheduler.add(make_sequence("e", [1, 2], SamplingParams(max_tokens=4), cold, others=others))
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [
        ("cold", 0, 6),
        ("full", 0, 8),
        ("e", 4, 4),
        ("e/1", 7, 2),
        ("e/2", 5, 2),
        ("e/3", 8, 2),
        ("e/4", 0, 2),
    ]
    assert len(plan.block_copies) == 2
    finish_step(scheduler, plan)


def test_an_ensemble_whose_repeated_virtual_tokens_exceed_the_budget_copies_them_a_step_later() -> None:
    scheduler = make(budget=16)
    soft_prompts = [source(6, f"d{index}", is_key_values=False) for index in range(2)]
    scheduler.add(make_sequence("e", [1], SamplingParams(max_tokens=4), soft_prompts[0], others=(soft_prompts[1],)))
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [("d0", 0, 6), ("d1", 0, 6)]
    finish_step(scheduler, plan)
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [("e", 6, 1), ("e/1", 6, 1)]
    assert len(plan.block_copies) == 2


def test_a_member_that_the_budget_cuts_before_its_text_goes_on_there() -> None:
    scheduler = make(budget=21)
    first, second = (source(7, f"d{index}", is_key_values=False) for index in range(2))
    scheduler.add(make_sequence("e", [1, 2, 3], SamplingParams(max_tokens=4), first, others=(second,)))
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [("d0", 0, 7), ("d1", 0, 7), ("e", 4, 5), ("e/1", 4, 2)]
    assert [chunk.num_virtual_tokens for chunk in plan.chunks] == [7, 7, 3, 2]
    finish_step(scheduler, plan)
    plan = scheduler.schedule(0.0)
    assert spans(plan) == [("e", 9, 1), ("e/1", 6, 4)]
    assert [chunk.num_virtual_tokens for chunk in plan.chunks] == [0, 1]
    assert plan.block_copies == []
    finish_step(scheduler, plan)


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
