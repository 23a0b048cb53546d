"""Random requests, steps, aborts, evictions and new versions: the books must balance, and everything must end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scripts.soak_model import Limits
from scripts.soak_scheduler import NUM_ADAPTERS, NUM_PROMPTS, Drive, soak
from server.engine.scheduling import block_manager
from server.engine.scheduling.adapter_memory import AdapterMemory
from server.engine.scheduling.adapter_turns import AdapterTurns
from server.engine.scheduling.block_manager import Admission, BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun


class Machine(RuleBasedStateMachine):
    """Random events of a scheduler, chosen by hypothesis."""

    def __init__(self) -> None:
        super().__init__()
        self.drive = Drive()

    @rule(
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 10),
        prompt=st.integers(0, NUM_PROMPTS - 1),
        variant=st.integers(0, 1),
        tenant=st.integers(0, 2),
        priority=st.sampled_from([-100, -1, 0, 3]),
        timeout=st.sampled_from([None, 2.0, 20.0]),
        num_members=st.sampled_from([1, 1, 2, 3]),
        adapter=st.sampled_from([0, *range(NUM_ADAPTERS)]),
    )
    def add(
        self,
        length: int,
        max_tokens: int,
        prompt: int,
        variant: int,
        tenant: int,
        priority: int,
        timeout: float | None,
        num_members: int,
        adapter: int,
    ) -> None:
        self.drive.add(length, max_tokens, prompt, variant, tenant, priority, timeout, num_members, adapter)

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.drive.step()

    @rule(choice=st.integers(0, 20))
    def abort(self, choice: int) -> None:
        self.drive.abort(choice)

    @rule(prompt=st.integers(0, NUM_PROMPTS - 1))
    def swap(self, prompt: int) -> None:
        self.drive.swap(prompt)

    @rule(number=st.integers(0, NUM_ADAPTERS - 1))
    def pin(self, number: int) -> None:
        self.drive.pin(number)

    @rule()
    def evict(self) -> None:
        self.drive.evict()

    @invariant()
    def books_balance(self) -> None:
        self.drive.scheduler.check_integrity()

    def teardown(self) -> None:
        self.drive.finish()


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMachine = Machine.TestCase


@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(num_blocks=9, block_size=5, max_num_seqs=9, max_num_batched_tokens=9),
        Limits(num_blocks=40, block_size=1, max_num_seqs=3, max_num_batched_tokens=3),
        Limits(num_blocks=60, block_size=4, max_num_seqs=16, max_num_batched_tokens=64),
        Limits(step_fill_tokens=None),
        Limits(num_blocks=9, block_size=5, max_num_seqs=9, max_num_batched_tokens=9, step_fill_tokens=0),
        Limits(num_blocks=60, max_num_seqs=9, max_num_batched_tokens=30, adapter_bytes=8),
        Limits(num_blocks=60, max_num_seqs=9, max_num_batched_tokens=30, adapter_bytes=30, held_adapter_bytes=9),
    ],
    ids=[
        "short",
        "hardly one",
        "blocks of one",
        "roomy",
        "no loads",
        "only loads",
        "room for one adapter",
        "few adapters at once",
    ],
)
def test_a_short_soak(limits: Limits) -> None:
    drive = soak(1000, 5, limits)
    assert drive.tally.finished > 100


@pytest.mark.slow
def test_a_soak_covers_its_cases() -> None:
    drive = soak(6000, 1)
    tally, blocks = drive.tally, drive.scheduler.block_manager.stats
    assert min(tally.finished, tally.aborted, tally.expired, tally.promoted, tally.ensembles) > 10
    assert min(tally.spoiled, tally.not_finite, tally.repeated) > 10
    assert min(tally.loaded, tally.abandoned, tally.unloadable, tally.beside) > 10
    assert min(tally.adapted, tally.unreadable, drive.adapters.stats.hits, drive.adapters.stats.evictions) > 10
    assert tally.outgrown > 3
    assert min(drive.scheduler.num_preemptions, blocks.hits, blocks.run_hits, blocks.run_evictions) > 10


_admit = BlockManager.admit


def _admit_with_early_copy(
    self: BlockManager,
    seq: Sequence,
    run: SoftPromptRun | None,
    headroom: int = 0,
    filling: Collection[str] = (),
) -> Admission | None:
    return _admit(self, seq, run, headroom)


def _admit_without_copy(
    self: BlockManager, seq: Sequence, run: SoftPromptRun | None, headroom: int = 0, filling: Collection[str] = ()
) -> Admission | None:
    return _admit(self, seq, run, headroom, filling if run is None else [run.key])


def _prefill_apart(self: Scheduler, plan: StepPlan, seq: Sequence, budget: int) -> int:
    for member in seq.members:
        num_tokens = min(member.num_positions - member.num_computed, budget)
        if num_tokens:
            self._add_chunk(plan, member, num_tokens)
            budget -= num_tokens
    return budget


def _admit_some(
    self: BlockManager,
    members: Iterable[tuple[Sequence, SoftPromptRun | None]],
    headroom: int,
    filling: Collection[str],
) -> list[Admission] | None:
    admissions = [self.admit(seq, run, headroom, filling) for seq, run in members]
    given = [admission for admission in admissions if admission is not None]
    return given if len(given) == len(admissions) else None


def _spoil_no_followers(
    self: Scheduler, plan: StepPlan, spoiled: Mapping[int, int]
) -> tuple[list[Sequence], list[Sequence]]:
    for number, first in spoiled.items():
        chunk = plan.chunks[number]
        self.block_manager.withdraw(chunk.block_table[index] for index in chunk.shared if index >= first)
    wrote = {chunk.seq.request_id for number in spoiled if (chunk := plan.chunks[number]).seq is not None}
    return [seq for seq in self.running if any(member.request_id in wrote for member in seq.members)], []


def _release_early(self: BlockManager, run: SoftPromptRun) -> None:
    run.ref_count -= 1
    if run.ref_count == 0:
        self._retire(run)
        run.ref_count = -1  # so that the end of the load does nothing


def _flow_without_adapter(seq: Sequence) -> str:
    return seq.request.soft_prompt.identity if seq.request.soft_prompt else ""


_hold = AdapterTurns.hold


def _hold_without_reading(self: AdapterTurns, seq: Sequence, now: float) -> bool:
    return _hold(self, seq, now) or seq.request_id in self._turns


def _stay_idle(self: AdapterMemory, entry: Any) -> None:
    self._idle_bytes -= entry.nbytes


@pytest.mark.parametrize(
    ("owner", "method", "fault"),
    [
        (BlockManager, "withdraw", lambda self, block_ids: None),  # leaves poisoned blocks findable
        (SoftPromptRun, "spoil", lambda self: None),  # keeps a poisoned soft prompt
        (Scheduler, "spoil", _spoil_no_followers),  # misses readers of the same step
        (
            Scheduler,
            "_can_start",
            lambda self, members, budget, filling: True,
        ),  # reads a soft prompt that is not filled
        (BlockManager, "admit", _admit_with_early_copy),  # copies a block before it is filled
        (BlockManager, "admit", _admit_without_copy),  # computes keys and values that can only be copied
        (BlockManager, "_seed", lambda self, seq: b"seed"),  # shares text between tenants and soft prompts
        (BlockManager, "_hash", lambda self, seq, index, parent: parent + b"%d" % index),  # ignores the text
        (Scheduler, "_schedule_prefills", lambda self, plan, budget: 0),  # never prefills
        (Scheduler, "_prefill", _prefill_apart),  # lets members of an ensemble finish prefill separately
        (BlockManager, "admit_all", _admit_some),  # admits only some members
        (SoftPromptRun, "is_filled", property(lambda self: True)),  # reads what is loading
        (BlockManager, "is_loading", property(lambda self: False)),  # preempts the first sequence during a load
        (BlockManager, "release_run", _release_early),  # frees blocks to which a load still writes
        (block_manager, "run_key", lambda source, adapter: source.identity),  # shares embeddings between adapters
        (Sequence, "flow", property(_flow_without_adapter)),  # shares text between adapters
        (AdapterTurns, "hold", _hold_without_reading),  # computes with an adapter that is not in memory
        (AdapterTurns, "_release_later", lambda self: False),  # lets later sequences keep the room of the first
        (AdapterMemory, "_make_room", AdapterMemory._evict_idle),  # lets pins keep the room of the first
        (AdapterMemory, "_leave_idle", _stay_idle),  # evicts adapters in use
        (AdapterMemory, "release", lambda self, name: False),  # keeps the room of sequences that ended
    ],
    ids=[
        "findable poison",
        "kept run",
        "no followers",
        "not filled",
        "early copy",
        "no copy",
        "shared seed",
        "same hash",
        "no prefill",
        "apart",
        "some members",
        "read early",
        "preempted first",
        "freed early",
        "one run for all adapters",
        "one text for all adapters",
        "not read",
        "kept by later ones",
        "kept by pins",
        "evicted in use",
        "kept after the end",
    ],
)
def test_the_soak_finds_defects(
    owner: type | ModuleType, method: str, fault: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, fault)
    with pytest.raises(AssertionError):
        soak(4000, 2)
