from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.block_manager import BlockManager
from server.engine.scheduler import Scheduler, StepPlan
from server.engine.types import FinishReason, SamplingParams, Sequence, SoftPromptSource


def make(num_blocks: int = 64, block_size: int = 4, seqs: int = 8, budget: int = 16, length: int = 128) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(blocks, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length)


def source(num: int, digest: str, *, is_key_values: bool) -> SoftPromptSource:
    return SoftPromptSource(digest=digest, num_virtual_tokens=num, is_key_values=is_key_values, path="/nowhere")


def seq(name: str, length: int, max_tokens: int = 4, soft_prompt: SoftPromptSource | None = None) -> Sequence:
    return Sequence(name, list(range(length)), SamplingParams(max_tokens=max_tokens), soft_prompt)


def finish_step(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the engine does after a step, with made-up tokens."""
    for chunk in plan.chunks:
        if chunk.seq is not None and chunk.samples:
            chunk.seq.token_ids.append(1)
            if chunk.seq.num_new_tokens == chunk.seq.params.max_tokens:
                scheduler.finish(chunk.seq, FinishReason.LENGTH)
    scheduler.check_integrity()


def test_budgets_are_checked() -> None:
    with pytest.raises(ValueError, match="max_num_seqs 9 has to be"):
        make(seqs=9, budget=8)


def test_decodes_come_first_and_prefill_is_cut_into_chunks() -> None:
    scheduler = make(budget=10)
    scheduler.add(seq("short", 3))
    finish_step(scheduler, scheduler.schedule())
    scheduler.add(seq("long", 25))
    plans = []
    for _ in range(3):
        plan = scheduler.schedule()
        plans.append([(chunk.seq.request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks])
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
    plan = scheduler.schedule()
    assert [run.key.identity for run in plan.key_value_fills] == ["kv"]
    assert [(chunk.seq.request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [
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
    first = scheduler.schedule()
    assert [(chunk.run is not None, chunk.num_tokens) for chunk in first.chunks] == [(True, 6), (False, 3)]
    finish_step(scheduler, first)
    second = scheduler.schedule()
    assert [chunk.seq.request_id for chunk in second.chunks] == ["bare", "a", "b"]
    assert scheduler.block_manager.stats.run_loads == 1


def test_followers_need_not_wait_for_full_blocks() -> None:
    scheduler = make(budget=16)
    scheduler.add(seq("a", 3, soft_prompt=source(8, "rows", is_key_values=False)))
    plan = scheduler.schedule()
    assert [(chunk.run is not None, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [
        (True, 0, 8),
        (False, 8, 3),
    ]


def test_long_soft_prompts_are_computed_in_chunks() -> None:
    scheduler = make(budget=8)
    scheduler.add(seq("a", 3, soft_prompt=source(18, "rows", is_key_values=False)))
    spans = []
    for _ in range(4):
        plan = scheduler.schedule()
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
        finish_step(scheduler, scheduler.schedule())
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
def test_what_can_never_fit_is_refused_with_the_numbers(
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


def test_abort_gives_everything_back() -> None:
    scheduler = make()
    soft_prompt = source(6, "rows", is_key_values=False)
    scheduler.add(seq("waits", 3, soft_prompt=soft_prompt))
    scheduler.add(seq("runs", 20))
    scheduler.schedule()
    assert scheduler.abort("waits").finish_reason is FinishReason.ABORT
    assert scheduler.abort("runs").finish_reason is FinishReason.ABORT
    assert scheduler.abort("runs") is None
    scheduler.check_integrity()
    assert scheduler.block_manager.num_available == 64
    assert scheduler.schedule().is_empty


def test_waiting_soft_prompts_let_go_when_the_first_needs_their_blocks() -> None:
    scheduler = make(num_blocks=6, budget=32, seqs=4)
    for index in range(3):
        scheduler.add(seq(f"s{index}", 9, 2, source(6, f"d{index}", is_key_values=False)))
    for _ in range(40):
        finish_step(scheduler, scheduler.schedule())
    assert not scheduler.has_work


class Machine(RuleBasedStateMachine):
    """Random requests, steps and aborts; the books must balance, and everything must end."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(num_blocks=14, block_size=3, seqs=5, budget=11, length=40)
        self.count = 0

    @rule(
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 10),
        prompt=st.integers(0, 6),
        salt=st.sampled_from(["", "tenant"]),
    )
    def add(self, length: int, max_tokens: int, prompt: int, salt: str) -> None:
        self.count += 1
        soft_prompt = source(prompt + 2, f"d{prompt}", is_key_values=prompt % 2 == 0) if prompt else None
        params = SamplingParams(max_tokens=max_tokens)
        candidate = Sequence(f"s{self.count}", [token % 3 for token in range(length)], params, soft_prompt, salt=salt)
        try:
            self.scheduler.add(candidate)
        except ValueError:
            fits = candidate.num_positions + max_tokens <= 40
            needed = self.scheduler.block_manager.blocks_to_finish(
                soft_prompt, candidate.num_positions + max_tokens - 1
            )
            assert not fits or needed > 14

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            plan = self.scheduler.schedule()
            assert plan.num_tokens <= 11
            assert len(self.scheduler.running) <= 5
            assert not plan.is_empty or not self.scheduler.has_work
            finish_step(self.scheduler, plan)

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.abort(f"s{data.draw(st.integers(1, self.count))}")

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            finish_step(self.scheduler, self.scheduler.schedule())
        assert not self.scheduler.has_work
        assert self.scheduler.block_manager.num_available == 14


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMachine = Machine.TestCase
