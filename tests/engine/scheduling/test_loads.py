"""Large soft prompts of keys and values are loaded beside the steps: who waits, and what may be evicted."""

from __future__ import annotations

import pytest

from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import SamplingParams, SoftPromptSource
from tests.support.engine.sequences import make_sequence


def make(num_blocks: int = 64, step_fill_tokens: int | None = 8) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=256,
        step_fill_tokens=step_fill_tokens,
    )


def add(scheduler: Scheduler, name: str, num_virtual: int = 0, max_tokens: int = 50, digest: str = "") -> Sequence:
    source = SoftPromptSource(
        digest=digest or name, num_virtual_tokens=num_virtual, is_key_values=True, path="/nowhere"
    )
    text = [len(name), *map(ord, name)]
    seq = make_sequence(name, text, SamplingParams(max_tokens=max_tokens), source if num_virtual else None)
    scheduler.add(seq)
    return seq


def step(scheduler: Scheduler) -> StepPlan:
    """One step; each sequence that samples gets a token."""
    plan = scheduler.schedule(0.0)
    for chunk in plan.chunks:
        if chunk.seq is not None and chunk.samples:
            chunk.seq.token_ids.append(1)
    scheduler.check_integrity()
    return plan


def names(plan: StepPlan) -> list[str]:
    return [chunk.seq.request_id for chunk in plan.chunks if chunk.seq is not None]


def loads(plan: StepPlan) -> list[str]:
    return [run.key for run in plan.loads]


def fills(plan: StepPlan) -> list[str]:
    return [run.key for run in plan.key_value_fills]


def test_a_step_copies_up_to_its_limit_and_the_rest_is_loaded() -> None:
    scheduler = make()
    for name, num_virtual in [("a", 5), ("b", 4), ("c", 3), ("d", 9)]:
        add(scheduler, name, num_virtual)
    plan = step(scheduler)
    assert (fills(plan), loads(plan), names(plan)) == (["a", "c"], ["b", "d"], ["a", "c"])
    assert loads(step(scheduler)) == []


def test_without_a_limit_a_step_copies_all() -> None:
    scheduler = make(step_fill_tokens=None)
    add(scheduler, "a", 100)
    plan = step(scheduler)
    assert (fills(plan), loads(plan), names(plan)) == (["a"], [], ["a"])


def test_sequences_start_in_the_step_after_the_end_of_the_load() -> None:
    scheduler = make()
    for name in ("first", "second"):
        add(scheduler, name, 40, digest="shared")
    plan = step(scheduler)
    assert (loads(plan), names(plan), plan.is_empty) == (["shared"], [], True)
    add(scheduler, "bare")
    assert names(step(scheduler)) == ["bare"]
    scheduler.block_manager.end_load(plan.loads[0], is_filled=True)
    assert names(step(scheduler)) == ["bare", "first", "second"]
    assert scheduler.block_manager.stats.run_loads == 1


def test_a_loading_soft_prompt_is_not_evicted_but_a_loaded_one_is() -> None:
    scheduler = make(num_blocks=20)
    waiting = add(scheduler, "waits", 40, max_tokens=4)
    (run,) = step(scheduler).loads
    scheduler.abort("waits")
    blocks = scheduler.block_manager
    scheduler.check_integrity()
    assert (blocks.num_available, blocks.num_cached) == (10, 0)
    assert waiting.block_table == []
    blocks.end_load(run, is_filled=True)
    scheduler.check_integrity()
    assert (blocks.num_available, blocks.num_cached) == (20, 10)
    add(scheduler, "again", 40, max_tokens=4, digest="waits")
    plan = step(scheduler)
    assert (loads(plan), names(plan)) == ([], ["again"])
    assert blocks.stats.run_hits == 1


def test_an_unfilled_load_is_freed_or_started_again() -> None:
    scheduler = make()
    add(scheduler, "a", 40)
    (run,) = step(scheduler).loads
    scheduler.block_manager.end_load(run, is_filled=False)
    scheduler.check_integrity()
    assert loads(step(scheduler)) == ["a"]
    scheduler.abort("a")
    scheduler.block_manager.end_load(run, is_filled=False)
    scheduler.check_integrity()
    assert scheduler.block_manager.num_available == 64
    with pytest.raises(AssertionError, match="a was not loading"):
        scheduler.block_manager.end_load(run, is_filled=True)


def test_a_load_leaves_a_block_for_each_running_sequence() -> None:
    scheduler = make(num_blocks=14)
    for name in ("a", "b"):
        add(scheduler, name, max_tokens=20)
    step(scheduler)  # takes two blocks
    add(scheduler, "too large", 41, max_tokens=1)
    assert loads(step(scheduler)) == []
    scheduler.abort("too large")
    add(scheduler, "fits", 40, max_tokens=1)
    assert loads(step(scheduler)) == ["fits"]


def test_the_last_running_sequence_waits_for_blocks_that_are_loading() -> None:
    scheduler = make(num_blocks=13)
    seqs = [add(scheduler, name) for name in ("a", "b")]
    step(scheduler)
    add(scheduler, "waits", 36, max_tokens=4)
    (run,) = step(scheduler).loads
    for _ in range(20):
        step(scheduler)
    assert names(step(scheduler)) == []
    assert scheduler.running == seqs[:1]
    assert len(seqs[0].block_table) == 4  # with those of the other, which was preempted
    assert scheduler.num_preemptions == 1
    scheduler.block_manager.end_load(run, is_filled=True)
    assert names(step(scheduler))[0] == "a"


def test_waiting_sequences_keep_what_is_loading_when_blocks_run_out() -> None:
    scheduler = make(num_blocks=18)
    add(scheduler, "a")
    step(scheduler)
    add(scheduler, "waits", 20, max_tokens=30)
    add(scheduler, "next", 24, max_tokens=1)
    plan = step(scheduler)
    assert loads(plan) == ["waits", "next"]
    scheduler.block_manager.end_load(plan.loads[0], is_filled=True)
    for _ in range(30):
        step(scheduler)
    assert [run.is_loading for run in scheduler.block_manager.runs.values()].count(True) == 1
    assert scheduler.num_preemptions <= 1


def test_the_earliest_deadline_of_what_has_not_run() -> None:
    scheduler = make()
    deadlines = [scheduler.next_deadline]
    source = SoftPromptSource(digest="d", num_virtual_tokens=40, is_key_values=True, path="/nowhere")
    for name, timeout in (("late", 9.0), ("early", 3.0), ("never", None)):
        scheduler.add(make_sequence(name, [1], SamplingParams(), source, timeout=timeout))
    deadlines.append(scheduler.next_deadline)
    (run,) = step(scheduler).loads
    deadlines.append(scheduler.next_deadline)
    scheduler.block_manager.end_load(run, is_filled=True)
    step(scheduler)
    deadlines.append(scheduler.next_deadline)
    assert deadlines == [None, 3.0, 3.0, None]
