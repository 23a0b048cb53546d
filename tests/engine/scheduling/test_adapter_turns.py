"""Adapters are read near the turn of their sequences; who waits for room cannot starve, nor starve others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduling.adapter_memory import MAX_READS, AdapterMemory
from server.engine.scheduling.adapter_turns import READ_AHEAD
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import AdapterSource, FinishReason, GenerateRequest, Member, SamplingParams, SoftPromptSource

SIZE = 10


class Files:
    """Notes what is read, and is in memory."""

    def __init__(self) -> None:
        self.reading: list[str] = []
        self.resident: set[str] = set()
        self.num_reads = 0
        self.most = 0

    def start(self, source: AdapterSource) -> None:
        self.reading.append(source.identity)
        self.num_reads += 1
        self.most = max(self.most, len(self.reading))

    def drop(self, identity: str) -> None:
        self.resident.remove(identity)


class Harness:
    """A scheduler with room for a number of adapters, whose reads end on demand."""

    def __init__(self, room: int, *, seqs: int = 4, blocks: int = 256, length: int = 64) -> None:
        self.files = Files()
        self.room = room
        self.memory = AdapterMemory(self.files, budget_bytes=room * SIZE, bytes_per_parameter=1)
        self.scheduler = Scheduler(
            BlockManager(blocks, 4),
            max_num_seqs=seqs,
            max_num_batched_tokens=64,
            max_model_len=length,
            adapter_memory=self.memory,
        )
        self.started: list[str] = []
        self.plan = StepPlan()

    def add(
        self,
        name: str,
        *adapters: str | None,
        max_tokens: int = 2,
        priority: int = 0,
        soft_prompt: SoftPromptSource | None = None,
        is_batch: bool = False,
    ) -> Sequence:
        """Add a sequence; an ensemble if there are several adapters."""
        first, *others = adapters or (None,)
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=[1, 2, 3],
            params=SamplingParams(max_tokens=max_tokens),
            soft_prompt=soft_prompt,
            adapter=None if first is None else source(first),
            others=tuple(Member(adapter=None if one is None else source(one)) for one in others),
            priority=priority,
            is_batch=is_batch,
        )
        seq = Sequence(request)
        self.scheduler.add(seq)
        return seq

    def step(self, *, reads: int = 1000) -> list[str]:
        """End some reads, and compute one step; returns the ids of the chunks' sequences."""
        for name in self.files.reading[:reads]:
            self.files.reading.remove(name)
            self.files.resident.add(name)
            assert self.memory.end_read(name, SIZE) is None
        before = {seq.request_id for seq in self.scheduler.running}
        self.plan = plan = self.scheduler.schedule(0.0)
        self.started += [seq.request_id for seq in self.scheduler.running if seq.request_id not in before]
        for chunk in plan.chunks:
            assert chunk.adapter is None or chunk.adapter.identity in self.files.resident
        assert len(self.files.resident) + len(self.files.reading) <= self.room
        names = [chunk.seq.request_id for chunk in plan.chunks if chunk.seq is not None]
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq is not None and chunk.samples and not seq.is_follower:
                seq.token_ids.append(1)
                if seq.num_new_tokens == seq.request.params.max_tokens:
                    self.scheduler.finish(seq, FinishReason.LENGTH)
        self.scheduler.check_integrity()
        return names

    def finish(self) -> None:
        """Step until every sequence has ended."""
        for _ in range(20_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("sequences never ended")


def source(name: str) -> AdapterSource:
    return AdapterSource(digest=name, path="/nowhere", config_path="/nowhere", num_parameters=SIZE)


def test_an_adapter_is_read_at_its_turn_and_not_at_arrival() -> None:
    harness = Harness(4)
    harness.add("s", "a")
    assert harness.files.reading == []
    assert harness.step() == []
    assert harness.scheduler.adapters.is_reading
    assert harness.files.reading == ["a"]
    assert harness.step() == ["s"]
    assert harness.plan.num_distinct_adapters == 1


def test_a_sequence_whose_adapter_is_in_memory_starts_at_once() -> None:
    harness = Harness(4)
    harness.add("s", "a")
    harness.finish()
    harness.add("t", "a")
    assert harness.step() == ["t"]
    counts = harness.scheduler.adapters.wait_seconds
    assert (counts.count, counts.sum) == (2, 0.0)


def test_others_start_while_an_adapter_is_read() -> None:
    harness = Harness(4)
    harness.add("s", "a")
    harness.add("bare")
    assert harness.step(reads=0) == ["bare"]
    assert sorted(harness.step()) == ["bare", "s"]


def test_a_slot_is_kept_for_a_sequence_whose_adapter_is_read() -> None:
    harness = Harness(4, seqs=1)
    harness.add("s", "a")
    harness.add("bare")
    assert harness.step() == []
    assert harness.step() == ["s"]


def test_adapters_of_the_next_sequences_are_read_while_all_slots_are_taken() -> None:
    harness = Harness(20, seqs=2)
    for number in range(10):
        harness.add(f"s{number}", f"a{number}", max_tokens=9)
    harness.step()
    assert len(harness.step()) == 2
    assert harness.files.num_reads == 2 + READ_AHEAD
    for _ in range(5):
        harness.step()
    assert harness.files.num_reads == 2 + READ_AHEAD
    assert len(harness.scheduler.waiting.returned) == READ_AHEAD
    harness.finish()
    assert harness.started == [f"s{number}" for number in range(10)]


def test_without_adapters_no_sequence_gets_its_turn_early() -> None:
    harness = Harness(4, seqs=1)
    for number in range(4):
        harness.add(f"s{number}", max_tokens=9)
    harness.step()
    assert harness.scheduler.waiting.returned == []


def test_a_thousand_waiting_sequences_over_a_thousand_adapters_stay_within_the_budget() -> None:
    harness = Harness(64, seqs=32)
    for number in range(1000):
        harness.add(f"s{number}", f"a{number}")
    assert harness.files.num_reads == 0
    for _ in range(50):
        harness.step()
    assert harness.files.most <= MAX_READS
    harness.finish()
    assert harness.files.num_reads == 1000


def test_more_sequences_than_room_for_their_adapters_end() -> None:
    harness = Harness(64, seqs=64)
    for number in range(1024):
        harness.add(f"s{number}", f"a{number % 512}")
    harness.finish()
    assert len(harness.started) == 1024
    assert harness.files.num_reads <= 1024


def test_sequences_over_adapters_in_use_start_before_one_without_room() -> None:
    harness = Harness(1)
    harness.add("s", "a", max_tokens=20)
    harness.step()
    harness.step()
    harness.add("t", "b")
    harness.add("u", "a")
    harness.add("bare")
    assert sorted(harness.step()) == ["bare", "s", "u"]
    assert harness.files.num_reads == 1
    harness.finish()
    assert harness.started == ["s", "u", "bare", "t"]


def test_no_other_sequence_takes_the_room_of_the_first_that_waits_for_it() -> None:
    harness = Harness(2)
    harness.add("s", "a", max_tokens=20)
    harness.add("s2", "b", max_tokens=4)
    harness.step()
    harness.step()
    harness.add("pair", "c", "d")
    harness.add("t", "e")
    harness.finish()
    assert harness.started == ["s", "s2", "pair", "t"]


def test_waiting_sequences_give_their_adapters_to_earlier_ones() -> None:
    harness = Harness(2, seqs=2)
    harness.add("s", "a", max_tokens=9)
    harness.add("s2", max_tokens=9)
    harness.step()
    harness.step()
    harness.add("later", "b")
    harness.step()  # read ahead
    harness.step()
    assert harness.files.resident == {"a", "b"}
    harness.add("urgent", "c", priority=-1)
    harness.step()
    assert harness.files.reading == ["c"]
    assert harness.files.resident == {"a"}
    harness.finish()
    assert harness.started[-2:] == ["urgent", "later"]


def test_a_batch_sequence_gives_its_adapter_to_an_interactive_one() -> None:
    harness = Harness(1)
    harness.add("batch", "a", max_tokens=30, is_batch=True)
    harness.step()
    harness.step()
    assert harness.started == ["batch"]
    harness.add("s", "b", max_tokens=3)
    harness.finish()
    assert harness.started == ["batch", "s", "batch"]


def test_a_preempted_sequence_gets_its_adapter_back() -> None:
    harness = Harness(1, seqs=2, blocks=7)
    harness.add("s", "a", max_tokens=12)
    harness.add("t", "a", max_tokens=12)
    harness.finish()
    assert harness.scheduler.num_preemptions > 0
    assert harness.scheduler.adapters.wait_seconds.count == 2


def test_a_soft_prompt_of_embeddings_is_filled_under_each_adapter() -> None:
    harness = Harness(2)
    soft_prompt = SoftPromptSource(digest="d", num_virtual_tokens=5, is_key_values=False, path="/nowhere")
    for name, adapter in (("s", "a"), ("t", "b"), ("u", None), ("v", "a")):
        harness.add(name, adapter, soft_prompt=soft_prompt)
    harness.step()
    harness.step()
    filled = [(chunk.run.key, chunk.adapter) for chunk in harness.plan.chunks if chunk.run is not None]
    assert filled == [("d+a", source("a")), ("d+b", source("b"))]
    assert harness.plan.num_distinct_prompts == 1
    assert harness.scheduler.block_manager.runs.keys() == {"d", "d+a", "d+b"}


def test_a_sequence_that_ends_while_its_adapter_is_read_leaves_it_to_others() -> None:
    harness = Harness(1)
    harness.add("s", "a")
    harness.step()
    harness.scheduler.abort("s")
    harness.scheduler.check_integrity()
    harness.add("t", "b")
    harness.step(reads=0)
    assert harness.files.reading == ["a"]
    harness.step()
    assert harness.files.reading == ["b"]
    harness.finish()


def test_an_adapter_that_never_fits_is_refused() -> None:
    harness = Harness(1)
    with pytest.raises(ValueError, match="its adapters need 20 bytes of memory; the engine has 10"):
        harness.add("s", "a", "b")
    assert not harness.scheduler.has_work


def test_an_engine_without_adapters_refuses_them() -> None:
    scheduler = Scheduler(BlockManager(4, 4), max_num_seqs=1, max_num_batched_tokens=4, max_model_len=9)
    request = GenerateRequest(
        request_id="s", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), adapter=source("a")
    )
    seq = Sequence(request)
    with pytest.raises(ValueError, match="serves no adapters"):
        scheduler.add(seq)
    assert scheduler.adapters.refusal_of(seq) is not None


def test_all_waiting_users_of_an_adapter_are_found() -> None:
    harness = Harness(4, seqs=2)
    harness.add("first", "a", None, max_tokens=9)
    harness.step()
    harness.step()
    for name, *adapters in (("s", "b"), ("t", "b"), ("u", "c", "b"), ("v", "c")):
        harness.add(name, *adapters)
    assert [seq.request_id for seq in harness.scheduler.adapters.users("b")] == ["s", "t", "u"]


@given(
    adapters=st.lists(st.integers(0, 5), min_size=5, max_size=60),
    room=st.integers(1, 3),
    seqs=st.integers(1, 6),
    reads=st.lists(st.integers(0, 2), min_size=1, max_size=5),
)
@settings(deadline=None)
def test_what_overtakes_a_sequence_is_bounded(adapters: list[int], room: int, seqs: int, reads: list[int]) -> None:
    harness = Harness(room, seqs=seqs)
    limit = 20
    harness.scheduler.adapters._max_overtaken = limit
    live = [
        harness.add(f"s{index}", f"a{number}" if number else None, max_tokens=2 + index % 5)
        for index, number in enumerate(adapters)
    ]
    num_steps = 0
    while harness.scheduler.has_work:
        harness.step(reads=reads[num_steps % len(reads)] if num_steps % 4 else 1)
        num_steps += 1
        assert num_steps < 5000
    by_name = {seq.request_id: seq for seq in live}
    order = [by_name[name] for name in harness.started]
    largest = max(seq.cost for seq in live)
    for index, seq in enumerate(order):
        later = [
            one for one in order[:index] if one.turn is not None and seq.turn is not None and one.turn > seq.turn
        ]
        assert sum(one.cost for one in later) < limit + largest
