"""The next step is planned while the present one is computed, and no answer depends on that.

On the host nothing runs beside it; a test platform makes the engine keep the order of a device that does.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts import soak_poison
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.messages import Pin, Shutdown, StepOutputs
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.process.engine_process import EngineLoop
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.types import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Member,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    StepOutput,
    TokenEvent,
)
from tests.support.engine.classifiers import make_classifier
from tests.support.engine.fake_cuda import Recordable
from tests.support.engine.grammars import constraint, save_tokenizer
from tests.support.engine.harness import Family, add, failure_of, greedy, random_text, run, tokens
from tests.support.engine.harness import make_family as harness_make_family
from tests.support.engine.platforms import PlainPlatform
from tests.support.engine.recording_runner import RecordingRunner

pytestmark = pytest.mark.slow

TEXT = random_text(random.Random(5), 30, 30)
SOFT_PROMPTS = (None, "prefix_13", "prompt_tuning_8", "p_tuning_7")


class Diary:
    """What an engine does, in order: launches, waits, plans made ahead, and calls of ``meanwhile``."""

    def __init__(self, engine: LLMEngine) -> None:
        self.entries: list[str] = []
        self.plans: list[StepPlan] = []
        self._launch, self._plan_ahead = engine.runner.launch, engine.scheduler.plan_ahead
        engine.runner.launch = self.launch  # type: ignore[method-assign]
        engine.scheduler.plan_ahead = self.plan_ahead  # type: ignore[method-assign]

    def launch(self, plan: StepPlan, soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        self.entries.append("launch")
        self.plans.append(plan)
        output = self._launch(plan, soft_prompts)

        def wait() -> StepOutput:
            self.entries.append("wait")
            return output()

        return wait

    def plan_ahead(self) -> None:
        self.entries.append("plan ahead")
        self._plan_ahead()

    def meanwhile(self) -> None:
        self.entries.append("meanwhile")


def record(function: Callable[[], None]) -> Callable[[], None]:
    """A fake of a CUDA graph: calls the function again."""
    function()
    return function


@pytest.fixture
def overlapped(llama: Family, make_engine: Callable[..., LLMEngine]) -> LLMEngine:
    return make_engine(llama, PlainPlatform((Recordable,), record, overlaps_host=True))


def test_the_next_step_is_planned_between_a_launch_and_its_wait(overlapped: LLMEngine) -> None:
    diary = Diary(overlapped)
    add(overlapped, "a", TEXT, greedy(3))
    add(overlapped, "b", TEXT[1:], greedy(3))
    made: list[object] = []
    while overlapped.num_unfinished:
        overlapped.step(diary.meanwhile)
        made.append(overlapped.scheduler._ahead)
    prefill, replayed = ["meanwhile", "launch", "plan ahead", "wait"], ["launch", "meanwhile", "plan ahead", "wait"]
    assert diary.entries == [*prefill, *replayed, *replayed]
    # The step computes the very chunks that were made ahead.
    assert [plan.chunks for plan in diary.plans[1:]] == made[:-1]
    assert [len(plan.chunks) for plan in diary.plans] == [2, 2, 2]


def test_a_device_that_does_not_overlap_the_host_keeps_the_ordinary_order(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama)
    diary = Diary(engine)
    add(engine, "a", TEXT, greedy(2))
    while engine.num_unfinished:
        engine.step(diary.meanwhile)
    assert diary.entries == ["meanwhile", "launch", "wait"] * 2
    assert not engine.overlaps_host


def test_meanwhile_is_called_once_with_nothing_to_compute(overlapped: LLMEngine) -> None:
    diary = Diary(overlapped)
    assert overlapped.step(diary.meanwhile) == []
    assert diary.entries == ["meanwhile"]


def test_a_step_that_cannot_be_queued_is_computed_in_parts(llama: Family, overlapped: LLMEngine) -> None:
    diary = Diary(overlapped)
    launch = overlapped.runner.launch

    def launch_or_raise(plan: StepPlan, soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        if any(chunk.seq is not None and chunk.seq.request_id == "bad" for chunk in plan.chunks):
            raise IndexError("bad row")
        return launch(plan, soft_prompts)

    overlapped.runner.launch = launch_or_raise  # type: ignore[method-assign]
    add(overlapped, "bad", TEXT, greedy(3))
    add(overlapped, "good", TEXT[1:], greedy(3))
    (failed, first) = overlapped.step(diary.meanwhile)
    assert diary.entries == ["meanwhile", "launch", "wait"]
    message = "the model failed to compute this request (IndexError: bad row)"
    assert failure_of(failed) == RequestFailure(ErrorCode.FAILED, message)
    assert [first, *run(overlapped)["good"]][-1].finish_reason is FinishReason.LENGTH


def test_a_step_counts_once_with_the_time_that_it_took(overlapped: LLMEngine) -> None:
    add(overlapped, "a", TEXT, greedy(4))
    seconds = 0.0
    for _ in range(4):
        started = time.monotonic()
        overlapped.step(lambda: time.sleep(0.01))
        seconds += time.monotonic() - started
    stats = overlapped.stats
    assert stats.steps == stats.step_seconds.count == stats.batch_size.count == 4
    assert stats.batch_tokens.sum == len(TEXT) + 3
    assert 0.04 <= stats.step_seconds.sum <= seconds


# Random requests


@dataclass(frozen=True)
class Request:
    """A request; it arrives, and may be aborted, before the steps with these numbers."""

    text: list[int]
    max_tokens: int
    prompt: int
    members: int
    tenant: int
    priority: int
    arrival: int
    aborted: int | None
    num_stops: int
    is_greedy: bool
    fails_from: int | None

    def message(self, name: str, sources: list[SoftPromptSource | None]) -> GenerateRequest:
        source, *others = ([*sources, *sources][self.prompt + index] for index in range(self.members))
        params = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0 if self.is_greedy else 1.0,
            seed=3,
            stop_token_ids=tuple(range(self.num_stops)),
        )
        return GenerateRequest(
            request_id=name,
            prompt_token_ids=self.text,
            params=params,
            soft_prompt=source,
            others=tuple(Member(soft_prompt=one) for one in others),
            salt=str(self.tenant),
            priority=self.priority,
        )


REQUESTS = st.builds(
    Request,
    # Few different openings, so that sequences share blocks.
    text=st.builds(
        lambda opening, length, end: [opening] * length + end,
        st.integers(0, 1),
        st.integers(1, 14),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_tokens=st.integers(0, 12),
    prompt=st.integers(0, len(SOFT_PROMPTS) - 1),
    members=st.sampled_from([1, 1, 1, 2, 3]),
    tenant=st.integers(0, 1),
    priority=st.sampled_from([-2, 0, 0, 4]),
    arrival=st.integers(0, 8),
    aborted=st.one_of(st.none(), st.integers(0, 20)),
    num_stops=st.sampled_from([0, 10, 60]),  # of VOCABULARY
    is_greedy=st.booleans(),
    fails_from=st.one_of(st.none(), st.none(), st.integers(0, 20)),
)


@dataclass(frozen=True)
class Limits:
    """Small limits, so that blocks and budgets run short."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


LIMITS = st.builds(
    Limits,
    num_blocks=st.integers(20, 60),
    block_size=st.integers(1, 8),
    max_num_seqs=st.integers(3, 8),
    max_num_batched_tokens=st.integers(8, 40),
)


@pytest.fixture(scope="module")
def shared(make_family: Callable[[str], Family]) -> Iterator[LLMEngine]:
    """One engine for all examples, with its soft prompts in memory."""
    family = make_family("llama")
    settings = EngineSettings(model=str(family.path), dtype="float32", kv_cache_memory=2**20)
    made = LLMEngine(settings, platform=PlainPlatform())
    sources = [family.soft_prompts[name] for name in SOFT_PROMPTS if name]
    for source in sources:
        made.pin(Pin(source))
    while made.soft_prompts.stats.resident < len(sources):
        made.take_loaded()
        time.sleep(0.001)
    yield made
    made.close()


def without_times(events: list[TokenEvent]) -> list[TokenEvent]:
    """Without the numbers of steps, too: an engine that both runs share goes on counting."""
    return [msgspec.structs.replace(event, queue_seconds=None, prefill_seconds=None, step=0) for event in events]


def serve(
    engine: LLMEngine,
    limits: Limits,
    requests: dict[str, Request],
    sources: list[SoftPromptSource | None],
    *,
    overlaps_host: bool,
    **faults: Any,
) -> list[list[TokenEvent]]:
    """The events of each step; checks the scheduler's invariants after every step."""
    engine.overlaps_host = overlaps_host
    fails_from = {name: one.fails_from for name, one in requests.items() if one.fails_from is not None}
    runner = RecordingRunner(limits.block_size, fails_from, **faults)
    engine.runner.launch = runner.launch  # type: ignore[method-assign,assignment]
    engine.scheduler = Scheduler(
        BlockManager(limits.num_blocks, limits.block_size),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=200,
    )
    steps: list[list[TokenEvent]] = []
    last = max(request.arrival for request in requests.values())
    while engine.num_unfinished or len(steps) <= last:
        events = []
        for name, request in requests.items():
            if request.arrival == len(steps):
                events += engine.add(request.message(name, sources))
            if request.aborted == len(steps):
                events += engine.abort(name)
        events += engine.step()
        engine.scheduler.check_integrity()
        steps.append(without_times(events))
    assert engine.scheduler.block_manager.num_available == limits.num_blocks
    return steps


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=10),
    limits=LIMITS,
    bad_prompt=st.sampled_from([None, None, *SOFT_PROMPTS[1:]]),
    nan_every=st.sampled_from([None, 7, 40]),
    raises_late=st.booleans(),
)
def test_random_requests_have_the_events_of_the_ordinary_order(
    shared: LLMEngine,
    llama: Family,
    requests: list[Request],
    limits: Limits,
    bad_prompt: str | None,
    nan_every: int | None,
    raises_late: bool,
) -> None:
    sources = [llama.soft_prompts[name] if name else None for name in SOFT_PROMPTS]
    named = {f"r{index}": request for index, request in enumerate(requests)}
    bad_run = llama.soft_prompts[bad_prompt].identity if bad_prompt else None
    faults: dict[str, Any] = {"bad_run": bad_run, "nan_every": nan_every, "raises_late": raises_late}
    want = serve(shared, limits, named, sources, overlaps_host=False, **faults)
    got = serve(shared, limits, named, sources, overlaps_host=True, **faults)
    assert got == want
    ends = [
        event.request_id
        for events in got
        for event in events
        if event.finish_reason is not None or event.failure is not None
    ]
    assert sorted(ends) == sorted(named)


# The model


def test_a_mixed_batch_equals_peft(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    """Texts are prefilled in chunks beside decodes, and blocks are so short that sequences are preempted."""
    rng = random.Random(2)
    platform = PlainPlatform(overlaps_host=True)
    engine = make_engine(
        llama, platform, block_size=4, kv_cache_memory=150_000, max_num_batched_tokens=24, max_num_seqs=8
    )
    want = {}
    for index, key in enumerate([*llama.soft_prompts, None] * 3):
        text = random_text(rng, 1, 40)
        want[f"r{index}"] = llama.expected(key, text, 14)
        add(engine, f"r{index}", text, greedy(14), soft_prompt=llama.source(key))
    outputs = run(engine)
    assert {name: tokens(events) for name, events in outputs.items()} == want
    assert engine.stats.num_preemptions > 0


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = harness_make_family("llama", tmp_path_factory.mktemp("with-tokenizer"))
    save_tokenizer(family.path)
    return family


def test_every_kind_of_request_has_the_events_of_the_ordinary_order(
    with_tokenizer: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    classifier = make_classifier(with_tokenizer, "prompt_tuning", tmp_path / "classifier").source
    prompts = with_tokenizer.soft_prompts
    word = constraint("regex", "(true|ab)+ a")
    kinds: dict[str, dict[str, Any]] = {
        "grammar": {"params": greedy(12, constraint=word)},
        "grammar, drawn": {"params": SamplingParams(max_tokens=12, seed=1, constraint=word)},
        "ensemble": {
            "params": greedy(9),
            "soft_prompt": prompts["prefix_13"],
            "others": (None, prompts["p_tuning_7"]),
        },
        "stops": {"params": SamplingParams(max_tokens=30, seed=4, stop_token_ids=tuple(range(30)))},
        "at least": {"params": SamplingParams(max_tokens=9, seed=4, min_tokens=5, stop_token_ids=tuple(range(99)))},
        "scored": {"params": greedy(5, prompt_logprobs=2, logprobs=3), "soft_prompt": prompts["p_tuning_7"]},
        "only scored": {"params": greedy(0, prompt_logprobs=1)},
        "classified": {"params": greedy(0, classify=True), "soft_prompt": classifier},
        "penalised": {"params": greedy(9, repetition_penalty=1.4, frequency_penalty=0.5)},
        "truncated": {"params": SamplingParams(max_tokens=9, seed=6, top_p=0.95, temperature=2.0)},
        "urgent": {"params": greedy(6), "priority": -5},
    }
    answers = []
    for overlaps_host in (False, True):
        platform = PlainPlatform(overlaps_host=overlaps_host)
        engine = make_engine(with_tokenizer, platform, max_num_seqs=8, max_num_batched_tokens=40)
        for index, (name, fields) in enumerate(kinds.items()):
            add(engine, name, random_text(random.Random(name), 10, 30), **fields, salt=str(index))
            while engine.num_unfinished > engine.scheduler.num_sequences:  # it waits for a file or a grammar
                engine.take_loaded()
                time.sleep(0.001)
        answers.append({name: without_times(events) for name, events in run(engine).items()})
    assert answers[0] == answers[1]
    assert answers[0].keys() == kinds.keys()
    assert all(events[-1].failure is None for events in answers[0].values())
    assert answers[0]["stops"][-1].finish_reason is FinishReason.STOP


def test_poison_changes_no_healthy_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_poison, "Platform", lambda _device: PlainPlatform(overlaps_host=True))
    counts = soak_poison.soak(80, seed=3, backend="torch", block_size=5)
    assert min(counts["healthy"], counts["poison: not_finite"]) > 2


def test_the_loop_sends_every_event_of_an_overlapped_engine_once(
    llama: Family, overlapped: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = EngineLoop(theirs)
        sent: dict[str, list[TokenEvent]] = {}

        def send(message: StepOutputs) -> None:
            for event in message.events:
                sent.setdefault(event.request_id, []).append(event)
            if not message.has_work:
                loop._inbox.put(Shutdown())

        monkeypatch.setattr(loop, "_send", send)
        for index in range(4):
            loop._inbox.put(
                GenerateRequest(request_id=str(index), prompt_token_ids=TEXT[index:], params=greedy(3 + index))
            )
        loop._loop(overlapped)
    for index in range(4):
        events = sent[str(index)]
        assert tokens(events) == llama.expected(None, TEXT[index:], 3 + index)
        assert [event.finish_reason for event in events] == [None] * (2 + index) + [FinishReason.LENGTH]
