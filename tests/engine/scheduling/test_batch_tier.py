"""The service tier ``batch`` takes what interactive sequences leave."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduling.batch_tier import BatchTier
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import FinishReason, SamplingParams, SoftPromptSource
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

PROMPTS = [
    None,
    SoftPromptSource(digest="rows", num_virtual_tokens=3, is_key_values=False, path="/nowhere"),
    SoftPromptSource(digest="kv", num_virtual_tokens=6, is_key_values=True, path="/nowhere"),
]


def make(num_blocks: int = 64, seqs: int = 8, budget: int = 32, batch: int | None = None) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=64,
        batch_step_tokens=batch,
    )


def seq(name: str, length: int = 6, max_tokens: int = 4, prompt: int = 0, *, priority: int = 0) -> Sequence:
    """A sequence; it is of the batch tier if its name says so."""
    return make_sequence(
        name,
        [len(name), *range(length - 1)],
        SamplingParams(max_tokens=max_tokens),
        PROMPTS[prompt],
        priority=priority,
        is_batch=name.startswith("batch"),
    )


def step(scheduler: Scheduler) -> StepPlan:
    """Schedule a step, and do what the engine does after it, with made-up tokens."""
    plan = scheduler.schedule(0.0)
    for chunk in plan.chunks:
        if chunk.seq is not None and chunk.samples:
            chunk.seq.token_ids.append(1)
            if chunk.seq.num_new_tokens == chunk.seq.request.params.max_tokens:
                scheduler.finish(chunk.seq, FinishReason.LENGTH)
    scheduler.check_integrity()
    return plan


def names(plan: StepPlan) -> list[str]:
    return [present(chunk.seq).request_id for chunk in plan.chunks if chunk.seq is not None]


def test_a_bound_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_step_tokens is 0"):
        BatchTier(0)


def test_batch_work_runs_when_nothing_else_does() -> None:
    scheduler = make()
    scheduler.add(seq("batch"))
    assert names(step(scheduler)) == ["batch"]


def test_a_step_that_computes_an_interactive_text_has_no_batch_work() -> None:
    scheduler = make()
    scheduler.add(seq("batch"))
    step(scheduler)
    scheduler.add(seq("person"))
    assert names(step(scheduler)) == ["person"]
    assert names(step(scheduler)) == ["person", "batch"]  # decodes share their steps


def test_the_decodes_that_were_planned_ahead_are_held_too() -> None:
    scheduler = make()
    scheduler.add(seq("batch"))
    step(scheduler)
    scheduler.plan_ahead()
    scheduler.add(seq("person"))
    assert names(step(scheduler)) == ["person"]
    assert names(step(scheduler)) == ["person", "batch"]


def test_batch_sequences_wait_behind_every_priority_and_are_not_promoted() -> None:
    scheduler = make(seqs=1)
    scheduler.add(seq("batch", priority=-100))
    for number in range(400):
        scheduler.add(seq(f"person-{number}", length=20, max_tokens=1, priority=100))
    while len(scheduler.waiting) + len(scheduler.running) > 1:
        assert "batch" not in names(step(scheduler))
    assert names(step(scheduler)) == ["batch"]


def test_batch_sequences_keep_their_own_order_by_priority() -> None:
    scheduler = make(seqs=1)
    scheduler.add(seq("batch-later", priority=1))
    scheduler.add(seq("batch-sooner", priority=-1))
    assert names(step(scheduler)) == ["batch-sooner"]


def test_an_interactive_sequence_takes_a_slot_from_batch_work() -> None:
    scheduler = make(seqs=2)
    scheduler.add(seq("batch-1", max_tokens=20))
    scheduler.add(seq("batch-2", max_tokens=20))
    step(scheduler)
    scheduler.add(seq("person"))
    assert names(step(scheduler)) == ["person"]
    assert [own.request_id for own in scheduler.running] == ["person", "batch-1"]
    assert scheduler.num_preemptions == 0  # only those of interactive sequences are counted
    while scheduler.has_work:
        step(scheduler)


def test_an_interactive_sequence_takes_blocks_from_batch_work() -> None:
    scheduler = make(num_blocks=8)
    for number in range(3):
        scheduler.add(seq(f"batch-{number}", length=8, max_tokens=8))
    step(scheduler)
    scheduler.add(seq("person", length=20, max_tokens=4))
    assert names(step(scheduler)) == ["person"]
    while scheduler.has_work:
        step(scheduler)


def test_an_interactive_sequence_takes_blocks_for_its_soft_prompt() -> None:
    scheduler = make(num_blocks=8)
    for number in range(3):
        scheduler.add(seq(f"batch-{number}", length=8, max_tokens=8))
    step(scheduler)
    scheduler.add(seq("person", length=16, max_tokens=1, prompt=2))
    assert names(step(scheduler)) == ["person"]


def test_a_step_has_a_bounded_number_of_batch_tokens() -> None:
    scheduler = make(batch=8)
    for number in range(6):
        scheduler.add(seq(f"batch-{number}", length=10, max_tokens=9))
    most = 0
    while scheduler.has_work:
        plan = step(scheduler)
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= 8
        most = max(most, len(scheduler.running))
    assert most == 4


def test_batch_work_goes_on_while_what_holds_it_cannot_start() -> None:
    scheduler = Scheduler(
        BlockManager(64, 4), max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64, step_fill_tokens=0
    )
    scheduler.add(seq("batch", max_tokens=20))
    step(scheduler)
    scheduler.add(seq("person", prompt=2))  # its soft prompt is loaded beside the steps
    assert names(step(scheduler)) == ["batch"]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_sequence_ends_and_no_step_mixes_texts_of_people_with_batch_work(data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 12))
    scheduler = make(
        num_blocks=data.draw(st.sampled_from([10, 16, 40])),
        seqs=data.draw(st.integers(1, 5)),
        budget=data.draw(st.sampled_from([5, 9, 32])),
        batch=limit,
    )
    added = data.draw(
        st.lists(
            st.tuples(st.booleans(), st.integers(1, 14), st.integers(1, 6), st.integers(0, 1), st.integers(0, 4)),
            max_size=20,
        )
    )
    live: dict[str, Sequence] = {}

    def advance() -> None:
        if data.draw(st.booleans()):
            scheduler.plan_ahead()
        computing = {
            own.request_id
            for own in live.values()
            if not own.is_batch and own.end_reason is None and own.num_computed < own.num_positions - 1
        }
        plan = step(scheduler)
        batch = [chunk for chunk in plan.chunks if chunk.seq is not None and chunk.seq.is_batch]
        texts = [name for name in names(plan) if name in computing]
        assert not (batch and texts)
        assert sum(chunk.num_tokens for chunk in batch) <= max(limit, len(batch))

    for number, (is_batch, length, max_tokens, prompt, steps) in enumerate(added):
        one = seq(f"{'batch' if is_batch else 'person'}-{number}", length, max_tokens, prompt)
        scheduler.add(one)
        live[one.request_id] = one
        for _ in range(steps):
            advance()
    for _ in range(2000):
        if not scheduler.has_work:
            break
        advance()
    assert all(one.end_reason is FinishReason.LENGTH for one in live.values())
