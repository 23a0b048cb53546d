"""Plans made ahead of a step's result equal those made after it, but for the ids of blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.soak_model import Limits
from scripts.soak_scheduler import NUM_PROMPTS, Drive, soak
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import FinishReason, SamplingParams
from tests.support.engine.sequences import make_sequence
from tests.support.presence import present

LIMITS = [
    Limits(),
    Limits(num_blocks=9, block_size=5, max_num_seqs=9, max_num_batched_tokens=9),
    Limits(num_blocks=40, block_size=1, max_num_seqs=3, max_num_batched_tokens=3),
    Limits(num_blocks=60, block_size=4, max_num_seqs=16, max_num_batched_tokens=64),
]
IDS = ["short", "hardly one", "blocks of one", "roomy"]


def contents(plan: StepPlan) -> list[object]:
    """A plan without the ids of its blocks."""
    chunks = [
        (
            chunk.seq and chunk.seq.request_id,
            chunk.run and chunk.run.key,
            chunk.start,
            chunk.num_tokens,
            chunk.shared,
        )
        for chunk in plan.chunks
    ]
    return [*chunks, [run.key for run in plan.key_value_fills], len(plan.block_copies)]


def record(drive: Drive) -> list[list[object]]:
    """The contents of all plans of a drive, as they are made."""
    plans: list[list[object]] = []
    schedule = drive.scheduler.schedule

    def schedule_and_keep(now: float) -> StepPlan:
        plan = schedule(now)
        plans.append(contents(plan))
        return plan

    drive.scheduler.schedule = schedule_and_keep  # type: ignore[method-assign]
    return plans


def compare(limits: Limits, seed: int, num_events: int) -> tuple[Drive, int]:
    """Drive two schedulers by the same events, one of which plans ahead; returns it, and its plans made ahead."""
    drives = [Drive(limits), Drive(limits, plans_ahead=True)]
    plans = [record(drive) for drive in drives]
    taken = count_taken(drives[1].scheduler)
    rng = random.Random(seed)
    for _ in range(num_events):
        kind = rng.random()
        arguments: list[Any] = []
        if kind < 0.03:
            name, arguments = "abort", [rng.randrange(1000)]
        elif kind < 0.05:
            name, arguments = "swap", [rng.randrange(NUM_PROMPTS)]
        elif kind < 0.06:
            name = "evict"
        elif kind < 0.35:
            name = "add"
            arguments = [
                rng.randint(1, 24),
                rng.randint(1, 10),
                rng.randrange(NUM_PROMPTS),
                rng.randrange(2),
                rng.randrange(3),
                rng.choice((-100, -1, 0, 0, 5)),
                rng.choice((None, None, 5.0, 60.0)),
                rng.choice((1, 1, 1, 2, 3)),
            ]
        else:
            name, arguments = "step", [rng.random()]
        for drive in drives:
            getattr(drive, name)(*arguments)
        assert plans[0] == plans[1]
        assert list(drives[0].live) == list(drives[1].live)
    for drive in drives:
        drive.finish()
    assert plans[0] == plans[1]
    assert drives[0].tally == drives[1].tally
    first, second = (drive.scheduler for drive in drives)
    assert first.num_preemptions == second.num_preemptions
    # ``Drive.evict`` looks up a text that fills all available blocks, of which one that plans ahead may have fewer.
    stats = [replace(scheduler.block_manager.stats, queries=0) for scheduler in (first, second)]
    assert stats[0] == stats[1]
    return drives[1], taken[0]


def count_taken(scheduler: Scheduler) -> list[int]:
    """One number: the decodes that were planned ahead and computed."""
    count = [0]
    take = scheduler._take_ahead

    def take_and_count(plan: StepPlan, ahead: list[Chunk]) -> int:
        budget = take(plan, ahead)
        count[0] += len(plan.chunks)
        return budget

    scheduler._take_ahead = take_and_count  # type: ignore[method-assign]
    return count


@settings(max_examples=60)
@given(limits=st.sampled_from(LIMITS), seed=st.integers(0, 2**32), num_events=st.integers(1, 150))
def test_plans_made_ahead_are_those_made_after_the_result(limits: Limits, seed: int, num_events: int) -> None:
    compare(limits, seed, num_events)


@pytest.mark.parametrize("limits", LIMITS, ids=IDS)
def test_the_comparison_covers_its_cases(limits: Limits) -> None:
    drive, num_taken = compare(limits, 7, 4000)
    assert num_taken > 300
    assert min(drive.tally.finished, drive.tally.aborted) > 10
    if limits is LIMITS[0]:
        assert min(drive.tally.spoiled, drive.tally.not_finite, drive.tally.ensembles) > 5
        assert drive.scheduler.num_preemptions > 10


@pytest.mark.parametrize("limits", LIMITS, ids=IDS)
def test_a_short_soak_that_plans_ahead(limits: Limits) -> None:
    assert soak(1000, 5, limits, plans_ahead=True).tally.finished > 100


def _keep_ended(self: Scheduler, plan: StepPlan, ahead: list[Chunk]) -> int:
    for chunk in ahead:
        if chunk.seq is not None:
            self._commit(plan, chunk, chunk.seq)
    return self.max_num_batched_tokens - len(plan.chunks)


def _take_without_registering(self: Scheduler, plan: StepPlan, ahead: list[Chunk]) -> int:
    for chunk in ahead:
        if chunk.seq is not None and chunk.seq.block_table is chunk.block_table:
            plan.chunks.append(chunk)
            chunk.seq.num_computed = chunk.stop
    return self.max_num_batched_tokens - len(plan.chunks)


_extend = BlockManager.extend


def _extend_by_eviction(self: BlockManager, seq: Sequence, num_positions: int, *, evicts: bool = True) -> bool:
    return _extend(self, seq, num_positions)


@pytest.mark.parametrize(
    ("owner", "method", "fault"),
    [
        (Scheduler, "_take_ahead", _keep_ended),  # computes sequences that have ended
        (Scheduler, "_take_ahead", _take_without_registering),  # shares fewer blocks
        (BlockManager, "extend", _extend_by_eviction),  # evicts what an ended sequence would have spared
    ],
    ids=["keeps ended", "does not register", "evicts"],
)
def test_the_comparison_finds_defects(
    owner: type, method: str, fault: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, fault)
    with pytest.raises((AssertionError, IndexError)):
        compare(LIMITS[0], 7, 2500)


def make(num_blocks: int) -> Scheduler:
    blocks = BlockManager(num_blocks, 4)
    return Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)


def add(scheduler: Scheduler, lengths: Iterable[tuple[str, int, int]]) -> dict[str, Sequence]:
    seqs = {
        name: make_sequence(name, list(range(length)), SamplingParams(max_tokens=max_tokens), salt=name)
        for name, length, max_tokens in lengths
    }
    for seq in seqs.values():
        scheduler.add(seq)
    return seqs


def sample(plan: StepPlan, ended: Collection[str] = (), scheduler: Scheduler | None = None) -> None:
    for chunk in plan.chunks:
        if chunk.seq is not None and chunk.samples:
            chunk.seq.token_ids.append(1)
            if scheduler is not None and chunk.seq.request_id in ended:
                scheduler.finish(chunk.seq, FinishReason.STOP)


def test_a_sequence_at_its_last_token_takes_no_block() -> None:
    scheduler = make(8)
    seqs = add(scheduler, [("last", 4, 1), ("on", 4, 2), ("long", 30, 2)])
    plan = scheduler.schedule(0.0)
    scheduler.plan_ahead()
    assert [len(seqs[name].block_table) for name in ("last", "on")] == [1, 2]
    sample(plan, ["last"], scheduler)
    chunks = scheduler.schedule(0.0).chunks
    assert [(chunk.seq, chunk.start, chunk.num_tokens) for chunk in chunks] == [(seqs["on"], 4, 1)]
    scheduler.check_integrity()


def test_a_block_for_a_sequence_that_ends_is_released() -> None:
    scheduler = make(8)
    add(scheduler, [("a", 4, 9), ("b", 4, 9)])
    plan = scheduler.schedule(0.0)
    scheduler.plan_ahead()
    assert scheduler.block_manager.num_available == 4
    sample(plan, ["a", "b"], scheduler)
    assert scheduler.schedule(0.0).is_empty
    assert scheduler.block_manager.num_available == 8
    scheduler.check_integrity()


def test_without_free_blocks_all_decodes_are_planned_after_the_result() -> None:
    scheduler = make(3)
    seqs = add(scheduler, [("a", 4, 5), ("b", 4, 5)])
    plan = scheduler.schedule(0.0)  # the reserve of a block lets both run
    assert [chunk.seq for chunk in plan.chunks] == [seqs["a"], seqs["b"]]
    scheduler.plan_ahead()
    assert (len(seqs["a"].block_table), len(seqs["b"].block_table)) == (2, 1)
    assert scheduler.num_preemptions == 0
    sample(plan)
    assert [chunk.seq for chunk in scheduler.schedule(0.0).chunks] == [seqs["a"]]
    assert scheduler.num_preemptions == 1
    scheduler.check_integrity()


def test_idle_blocks_are_not_evicted_ahead() -> None:
    scheduler = make(4)
    add(scheduler, [("cached", 9, 1)])
    sample(scheduler.schedule(0.0), ["cached"], scheduler)
    assert scheduler.block_manager.num_cached == 2
    seqs = add(scheduler, [("a", 4, 5), ("b", 4, 5)])
    plan = scheduler.schedule(0.0)
    assert scheduler.block_manager.num_cached == 2
    scheduler.plan_ahead()
    assert scheduler.block_manager.num_cached == 2
    sample(plan, ["a"], scheduler)
    (chunk,) = scheduler.schedule(0.0).chunks
    assert chunk.seq is seqs["b"]
    scheduler.check_integrity()


def test_the_integrity_check_knows_the_decodes_of_the_next_step() -> None:
    scheduler = make(8)
    add(scheduler, [("a", 4, 9), ("b", 4, 9)])
    plan = scheduler.schedule(0.0)
    scheduler.plan_ahead()
    sample(plan)
    scheduler.check_integrity()
    present(scheduler._ahead).pop()
    with pytest.raises(AssertionError, match="planned ahead"):
        scheduler.check_integrity()
