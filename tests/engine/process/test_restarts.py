"""What the engine's front does when processes die, do not start, or are stuck; the processes are fakes."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest

from prompt_store.histogram import LOAD_SECONDS_BOUNDS
from server.config import EngineSettings
from server.engine.messages import AbortRequest, FromEngine, Inspect, Inspected, Pin, Shutdown, StepOutputs, ToEngine
from server.engine.process.async_engine import AsyncEngine
from server.engine.process.cumulative_stats import (
    COUNTERS,
    MAXIMA,
    TIER_COUNTERS,
    TIERS,
    add_counters,
    counters_of,
)
from server.engine.process.supervision import Backoff, StepWatch
from server.engine.stats import STEP_SECONDS_BOUNDS, EngineStats, EngineTierStats
from server.engine.types import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)
from server.errors import (
    ConstraintError,
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineRestartingError,
    EngineStartError,
    NotFiniteError,
    RequestFailedError,
    RequestRefusedError,
    WaitTimeoutError,
)
from tests.support.waiting import until

anyio = pytest.mark.anyio
MODEL = ModelInfo(
    architecture="TinyForCausalLM",
    dtype="float32",
    device="cpu",
    embedding_width=8,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=258,
    max_model_len=64,
    block_size=16,
    num_blocks=10,
    eos_token_ids=(),
)
SOURCE = SoftPromptSource(digest="d", num_virtual_tokens=1, is_key_values=False, path="/nowhere")


class FakeProcess:
    """Answers each request with one token, unless it is ``silent``; ``die`` ends it."""

    def __init__(self, pid: int, model: ModelInfo) -> None:
        self.pid = pid
        self.model = model
        self.silent = False
        self.stubborn = False
        self.killed = False
        self.closed = False
        self.sent: list[ToEngine] = []
        self.stats = EngineStats(num_blocks=10)
        self._messages: asyncio.Queue[FromEngine | None] = asyncio.Queue()

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)
        if isinstance(message, Shutdown) and not self.stubborn:
            self.die()
        if isinstance(message, GenerateRequest) and not self.silent:
            self.stats.generation_tokens += 1
            self.report(TokenEvent(request_id=message.request_id, token_ids=[7], finish_reason=FinishReason.LENGTH))

    def report(self, *events: TokenEvent, has_work: bool = False) -> None:
        stats = msgspec.structs.replace(self.stats)
        self.reply(StepOutputs(events=list(events), stats=stats, num_received=len(self.sent), has_work=has_work))

    def reply(self, message: FromEngine) -> None:
        self._messages.put_nowait(message)

    def die(self) -> None:
        self._messages.put_nowait(None)

    async def receive(self) -> FromEngine:
        message = await self._messages.get()
        if message is None:
            raise EngineDeadError("the engine process ended")
        return message

    def kill(self) -> None:
        self.killed = True
        self.die()

    async def close(self) -> str:
        self.closed = True
        return "was ended by SIGKILL"


class Launcher:
    """Starts fake processes: what ``script`` holds is raised, or becomes the model, one for each start."""

    def __init__(self) -> None:
        self.script: list[Exception | ModelInfo] = []
        self.processes: list[FakeProcess] = []
        self.pauses: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_waiting = 0

    async def launch(self, settings: EngineSettings) -> FakeProcess:
        self.num_waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.num_waiting -= 1
        result = self.script.pop(0) if self.script else MODEL
        if isinstance(result, Exception):
            raise result
        self.processes.append(FakeProcess(100 + len(self.processes), result))
        return self.processes[-1]

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)


@asynccontextmanager
async def fake_engine(**settings: Any) -> AsyncIterator[tuple[AsyncEngine, Launcher]]:
    launcher = Launcher()
    engine = AsyncEngine(EngineSettings(model="tiny", **settings), launch=launcher.launch, sleep=launcher.sleep)
    await engine.start()
    try:
        yield engine, launcher
    finally:
        await engine.stop()
    assert all(process.closed for process in launcher.processes)


async def ask(engine: AsyncEngine, name: str) -> list[int]:
    request = GenerateRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams())
    return [token async for event in engine.generate(request) for token in event.token_ids]


def test_pauses_double_until_half_a_minute_and_start_again_after_good_service() -> None:
    backoff = Backoff()
    assert [backoff.pause() for _ in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    backoff.served(59.9)
    assert backoff.pause() == 30.0
    backoff.served(60.0)
    assert [backoff.pause() for _ in range(2)] == [0.5, 1.0]


def test_a_step_is_stuck_when_a_busy_process_says_nothing() -> None:
    watch = StepWatch(3.0, 1.0)
    assert not any(watch.poll() for _ in range(9))  # it has nothing to do
    watch.sent()
    assert [watch.poll() for _ in range(4)] == [False, False, False, True]
    watch.stepped(num_received=1, has_work=True)
    assert [watch.poll() for _ in range(4)] == [False, False, False, True]
    watch.stepped(num_received=1, has_work=False)
    assert not any(watch.poll() for _ in range(9))


def test_a_message_that_crosses_a_report_keeps_the_process_busy() -> None:
    watch = StepWatch(3.0, 1.0)
    watch.sent()
    watch.sent()
    watch.stepped(num_received=1, has_work=False)
    assert any(watch.poll() for _ in range(9))


def test_every_number_of_the_engine_is_a_counter_or_not() -> None:
    gauges = {"num_running", "num_waiting", "num_blocks", "block_size", "num_used_blocks", "num_cached_blocks"}
    gauges |= {"soft_prompts_resident", "soft_prompt_bytes", "num_batch_waiting"}
    assert {*COUNTERS, *gauges, *MAXIMA, *TIERS} == set(EngineStats.__struct_fields__)
    assert {*TIER_COUNTERS, "resident", "resident_bytes"} == set(EngineTierStats.__struct_fields__)


def test_counters_are_carried_over_and_what_was_held_is_not() -> None:
    host = EngineTierStats(hits=2, resident=3)
    host.load_seconds.observe(LOAD_SECONDS_BOUNDS, 0.5)
    stats = EngineStats(num_running=3, num_blocks=9, steps=5, host=host, max_batch_distinct_prompts=4)
    stats.step_seconds.observe(STEP_SECONDS_BOUNDS, 0.25)
    ended = counters_of(stats)
    assert (ended.num_running, ended.num_blocks, ended.steps, ended.host.resident, ended.host.hits) == (0, 0, 5, 0, 2)
    began = add_counters(EngineStats(num_blocks=8), ended)
    assert (began.num_blocks, began.steps, began.host.loads) == (8, 5, 1)
    both = add_counters(stats, ended)
    assert (both.steps, both.num_running, both.host.hits, both.host.resident) == (10, 3, 4, 3)
    assert (both.step_seconds.sum, sum(both.step_seconds.counts)) == (0.5, 2)
    assert (both.host.loads, both.host.load_seconds.sum, both.max_batch_distinct_prompts) == (2, 1.0, 4)


@anyio
async def test_a_dead_process_is_replaced_and_counters_go_on() -> None:
    async with fake_engine() as (engine, launcher):
        called: list[bool] = []
        engine.subscribe(lambda: called.append(engine.is_ready))
        engine.pin(SOURCE)
        assert await ask(engine, "one") == [7]
        launcher.processes[0].silent = True
        asked: list[asyncio.Task[Any]] = [asyncio.create_task(ask(engine, f"r{i}")) for i in range(3)]
        asked.append(asyncio.create_task(engine.prepare(SOURCE)))
        asked.append(asyncio.create_task(engine.inspect(SOURCE, num_nearest=1)))
        await until(lambda: len(launcher.processes[0].sent) == 7)
        launcher.gate.clear()
        launcher.processes[0].die()
        for task in asked:
            with pytest.raises(EngineDeadError):
                await task
        assert not engine.is_ready
        await until(lambda: launcher.num_waiting)
        assert engine.outage == "the engine process was ended by SIGKILL"
        for refused in (ask(engine, "late"), engine.inspect(SOURCE, num_nearest=1), engine.prepare(SOURCE)):
            with pytest.raises(EngineRestartingError, match="engine restarting: .*SIGKILL"):
                await refused
        assert (engine.stats.generation_tokens, engine.stats.num_blocks) == (1, 0)
        assert engine.model is MODEL
        launcher.gate.set()
        await until(lambda: engine.is_ready)
        assert called == [True]
        assert not engine.outage
        assert launcher.processes[1].sent == [Pin(SOURCE)]
        assert await ask(engine, "two") == [7]
        assert (engine.stats.generation_tokens, engine.stats.num_blocks, engine.stats.restarts) == (2, 10, 1)


EXCEPTIONS = {
    ErrorCode.FAILED: RequestFailedError,
    ErrorCode.NOT_FINITE: NotFiniteError,
    ErrorCode.REFUSED: RequestRefusedError,
    ErrorCode.CONSTRAINT: ConstraintError,
    ErrorCode.WAIT_TIMEOUT: WaitTimeoutError,
}


@anyio
@pytest.mark.parametrize("code", ErrorCode)
async def test_a_failure_is_raised_as_the_exception_of_its_code_and_ends_the_request(code: ErrorCode) -> None:
    async with fake_engine() as (engine, launcher):
        process = launcher.processes[0]
        process.silent = True
        asked = asyncio.create_task(ask(engine, "r"))
        await until(lambda: process.sent)
        process.report(TokenEvent(request_id="r", failure=RequestFailure(code, "the reason")))
        with pytest.raises(EngineError, match="^the reason$") as caught:
            await asked
        assert type(caught.value) is EXCEPTIONS[code]
        inspected = asyncio.create_task(engine.inspect(SOURCE, num_nearest=1))
        await until(lambda: isinstance(process.sent[-1], Inspect))
        process.reply(Inspected(1, RequestFailure(code, "the reason")))
        with pytest.raises(EXCEPTIONS[code]):
            await inspected
        assert not any(isinstance(message, AbortRequest) for message in process.sent)


@anyio
async def test_a_stream_that_had_ended_gets_no_error() -> None:
    async with fake_engine() as (engine, launcher):
        stream = engine.generate(GenerateRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams()))
        task = asyncio.create_task(anext(stream))
        await until(lambda: launcher.processes[0].sent)
        launcher.processes[0].die()  # behind the last token
        assert (await task).finish_reason is FinishReason.LENGTH
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@anyio
async def test_a_reader_that_goes_while_the_engine_restarts_aborts_nothing() -> None:
    async with fake_engine() as (engine, launcher):
        launcher.processes[0].silent = True
        stream = engine.generate(GenerateRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams()))
        task = asyncio.create_task(anext(stream))
        await until(lambda: launcher.processes[0].sent)
        launcher.gate.clear()
        launcher.processes[0].die()
        task.cancel()
        await until(lambda: launcher.num_waiting)
        launcher.gate.set()
        await until(lambda: engine.is_ready)
        assert not any(isinstance(message, AbortRequest) for message in launcher.processes[1].sent)


@anyio
async def test_it_is_tried_again_until_it_starts_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_engine() as (engine, launcher):
        launcher.script = [EngineStartError("cannot load the model 'tiny'")] * 3
        launcher.script += [ZeroDivisionError("a bug"), MODEL]
        outages: list[str | None] = []
        launch = launcher.launch

        async def note(settings: EngineSettings) -> FakeProcess:
            outages.append(engine.outage)
            return await launch(settings)

        engine._launch = note
        launcher.processes[0].die()
        await until(lambda: len(launcher.processes) == 2)
        assert launcher.pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
        assert outages[1] == "the engine cannot start again: cannot load the model 'tiny'"
        assert outages[4] == "the engine cannot start again: a bug"
        assert caplog.text.count("cannot load the model 'tiny'") == 3
        assert engine.stats.restarts == 1
        assert await ask(engine, "r") == [7]


@anyio
async def test_it_dies_twice() -> None:
    async with fake_engine() as (engine, launcher):
        launcher.processes[0].die()
        await until(lambda: len(launcher.processes) == 2 and engine.is_ready)
        launcher.processes[1].die()
        await until(lambda: len(launcher.processes) == 3 and engine.is_ready)
        assert launcher.pauses == [0.5, 1.0]
        assert engine.stats.restarts == 2
        assert await ask(engine, "r") == [7]


@anyio
async def test_another_model_is_not_served_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_engine() as (engine, launcher):
        other = msgspec.structs.replace(MODEL, vocab_size=9)
        launcher.script = [other, msgspec.structs.replace(MODEL, num_blocks=5)]
        launcher.processes[0].die()
        await until(lambda: len(launcher.processes) == 3)
        assert launcher.processes[1].killed
        assert "the model's files have been changed" in caplog.text
        assert engine.model.num_blocks == 5


@anyio
@pytest.mark.parametrize("drained", [False, True])
@pytest.mark.parametrize("where", ["launch", "pause"])
async def test_shutdown_while_it_restarts(where: str, drained: bool) -> None:
    async with fake_engine() as (engine, launcher):
        paused = asyncio.Event()

        async def sleep(seconds: float) -> None:
            paused.set()
            await asyncio.sleep(60)

        if where == "pause":
            engine._sleep = sleep
        else:
            launcher.gate.clear()
        launcher.processes[0].die()
        await until(lambda: launcher.num_waiting or paused.is_set())
        async with asyncio.timeout(1):
            if drained:
                await engine.drain(30.0)
            await engine.stop()
        assert (launcher.num_waiting, len(launcher.processes)) == (0, 1)
        with pytest.raises(EngineNotReadyError, match="does not accept requests"):
            await ask(engine, "late")


@anyio
async def test_it_dies_during_a_drain_and_stays_dead() -> None:
    async with fake_engine() as (engine, launcher):
        launcher.processes[0].silent = True
        asked = asyncio.create_task(ask(engine, "r"))
        await until(lambda: launcher.processes[0].sent)
        draining = asyncio.create_task(engine.drain(30.0))
        await asyncio.sleep(0)
        launcher.processes[0].die()
        async with asyncio.timeout(1):
            with pytest.raises(EngineDeadError):
                await asked
            await draining
        assert (launcher.pauses, engine.outage) == ([], None)


@anyio
async def test_the_first_start_is_not_tried_again() -> None:
    launcher = Launcher()
    launcher.script = [EngineStartError("too little memory")]
    engine = AsyncEngine(EngineSettings(model="tiny"), launch=launcher.launch, sleep=launcher.sleep)
    with pytest.raises(EngineStartError, match="too little memory"):
        await engine.start()
    await engine.stop()
    assert (launcher.pauses, engine.is_ready) == ([], False)


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each poll of the watch found."""
    found: list[bool] = []
    poll = StepWatch.poll

    def counted(watch: StepWatch) -> bool:
        found.append(poll(watch))
        return found[-1]

    monkeypatch.setattr(StepWatch, "poll", counted)
    return found


@anyio
async def test_a_stuck_step_is_ended_by_a_kill(caplog: pytest.LogCaptureFixture, polls: list[bool]) -> None:
    async with fake_engine(step_timeout=0.05) as (engine, launcher):
        await until(lambda: len(polls) > 20)  # idle for longer than the timeout
        assert len(launcher.processes) == 1
        launcher.processes[0].silent = True
        with pytest.raises(EngineDeadError):
            await ask(engine, "r")
        assert launcher.processes[0].killed
        assert "has taken more than 0.05 s" in caplog.text
        await until(lambda: engine.is_ready)
        assert await ask(engine, "again") == [7]
        assert (engine.stats.step_timeouts, engine.stats.restarts) == (1, 1)


@anyio
async def test_slow_steps_that_report_are_not_stuck(polls: list[bool]) -> None:
    async with fake_engine(step_timeout=0.2) as (engine, launcher):
        (process,) = launcher.processes
        process.silent = True
        asked = asyncio.create_task(ask(engine, "r"))
        for _ in range(20):
            polls.clear()
            await until(lambda: polls)
            process.report(has_work=True)
        process.report(TokenEvent(request_id="r", token_ids=[3], finish_reason=FinishReason.LENGTH))
        assert await asked == [3]
        assert not process.killed


@anyio
async def test_no_timeout_waits_for_ever() -> None:
    async with fake_engine(step_timeout=0.0) as (engine, launcher):
        launcher.processes[0].silent = True
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(engine, "r"), 0.2)
        assert not launcher.processes[0].killed


@anyio
async def test_a_process_that_does_not_stop_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inspect.getmodule(AsyncEngine), "STOP_SECONDS", 0.05)
    async with fake_engine() as (engine, launcher):
        launcher.processes[0].stubborn = True
        with caplog.at_level(logging.WARNING):
            await engine.stop()
        assert launcher.processes[0].killed
        assert "does not stop; killing it" in caplog.text


@anyio
async def test_a_message_that_cannot_be_handled_ends_the_process() -> None:
    async with fake_engine() as (engine, launcher):
        launcher.processes[0].report(None)  # type: ignore[arg-type]
        await until(lambda: launcher.processes[0].killed and engine.is_ready)
        assert await ask(engine, "r") == [7]


def holds_inspection(sent: list[Any]) -> bool:
    return any(isinstance(message, Inspect) for message in sent)


@anyio
async def test_an_inspection_of_a_dead_process_leaves_room_for_others() -> None:
    async with fake_engine() as (engine, launcher):
        for index in range(3):
            asked = asyncio.create_task(engine.inspect(SOURCE, num_nearest=1))
            process = launcher.processes[index]
            await until(partial(holds_inspection, process.sent))
            process.die()
            with pytest.raises(EngineDeadError):
                await asked
            await until(lambda: engine.is_ready)
        assert engine._inspections == {}
