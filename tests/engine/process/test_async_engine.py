"""The engine in its own process, behind its asyncio front."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.config import EngineSettings
from server.engine import frames, messages
from server.engine.interface import probe_member
from server.engine.process.async_engine import AsyncEngine
from server.engine.process.engine_process import EngineLoop
from server.engine.stats import EngineStats
from server.engine.types import (
    AdapterSource,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Inspection,
    Logprobs,
    Member,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)
from server.errors import (
    EngineDeadError,
    EngineNotReadyError,
    EngineStartError,
    NotFiniteError,
    RequestRefusedError,
    WaitTimeoutError,
)
from tests.support.engine.harness import Family, greedy
from tests.support.presence import present
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
TEXT = [5, 9, 2, 30, 41, 7]


@asynccontextmanager
async def running(family: Family, **settings: Any) -> AsyncIterator[AsyncEngine]:
    options = {"dtype": "float32", "kv_cache_memory": 4 * 2**20, "num_threads": 1, **settings}
    engine = AsyncEngine(EngineSettings(model=str(family.path), **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: AsyncEngine, request: GenerateRequest) -> tuple[list[int], FinishReason | None]:
    token_ids: list[int] = []
    reason = None
    async for event in engine.generate(request):
        token_ids += event.token_ids
        reason = event.finish_reason
    return token_ids, reason


async def exhaust(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def test_many_requests_at_once_equal_peft_and_an_abort_frees_its_blocks(llama: Family) -> None:
    async with running(llama) as engine:
        assert engine.is_ready
        assert engine.model.architecture == "LlamaForCausalLM"
        names = [None, *llama.soft_prompts]
        requests = [
            GenerateRequest(
                request_id=str(name),
                prompt_token_ids=TEXT,
                params=greedy(8),
                soft_prompt=llama.source(name),
            )
            for name in names
        ]
        results = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert results == [(llama.expected(name, TEXT, 8), FinishReason.LENGTH) for name in names]
        stream = engine.generate(GenerateRequest(request_id="gone", prompt_token_ids=TEXT, params=greedy(200)))
        await anext(stream)
        assert engine.stats.num_running == 1
        await stream.aclose()
        await until(lambda: engine.stats.num_running == 0)
        assert engine.stats.num_used_blocks == 0


async def test_prepare_brings_a_soft_prompt_onto_the_device(llama: Family) -> None:
    async with running(llama) as engine:
        await engine.prepare(llama.soft_prompts["p_tuning_7"])
        await until(lambda: engine.stats.soft_prompts_resident == 1)


async def test_a_probe_tells_whether_the_model_can_compute_with_a_soft_prompt(llama: Family, tmp_path: Path) -> None:
    rows = torch.full((5, 2 * 3 * 2 * 12), 3e38)
    save_file({"prompt_embeddings": rows}, tmp_path / "huge.safetensors")
    huge = SoftPromptSource(
        digest="huge", num_virtual_tokens=5, is_key_values=True, path=str(tmp_path / "huge.safetensors")
    )
    async with running(llama) as engine:
        for max_tokens in (0, 2):
            await probe_member(
                engine, Member(soft_prompt=llama.soft_prompts["prefix_13"]), TEXT, max_tokens=max_tokens
            )
            with pytest.raises(NotFiniteError, match="a value that is not finite"):
                await probe_member(
                    engine, Member(soft_prompt=huge), TEXT, max_tokens=max_tokens, salt="t", max_wait=9.0
                )
        with pytest.raises(RequestRefusedError, match="more than the 256 positions"):
            await probe_member(engine, Member(soft_prompt=huge), [1] * 300, max_tokens=2)
        stream = engine.generate(GenerateRequest(request_id="r", prompt_token_ids=TEXT, params=greedy(200)))
        await anext(stream)
        probing = asyncio.create_task(
            probe_member(engine, Member(soft_prompt=llama.soft_prompts["p_tuning_7"]), TEXT, max_tokens=200)
        )
        await until(lambda: engine.stats.num_running == 2)
        await engine.drain(0.0)
        with pytest.raises(EngineNotReadyError, match="shutting down"):
            await probing
        await stream.aclose()


async def test_request_that_cannot_be_served_fails_alone(llama: Family) -> None:
    async with running(llama) as engine:
        with pytest.raises(RequestRefusedError, match="more than the 256 positions"):
            await collect(engine, GenerateRequest(request_id="long", prompt_token_ids=[1] * 300, params=greedy(8)))
        assert await collect(
            engine, GenerateRequest(request_id="short", prompt_token_ids=TEXT, params=greedy(8))
        ) == (
            llama.expected(None, TEXT, 8),
            FinishReason.LENGTH,
        )


async def test_killed_process_ends_every_request_with_one_error(llama: Family) -> None:
    async with running(llama) as engine:
        streams = [
            engine.generate(GenerateRequest(request_id=f"r{i}", prompt_token_ids=TEXT, params=greedy(200)))
            for i in range(3)
        ]
        for stream in streams:
            await anext(stream)
        os.kill(present(engine._connection).pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="the engine process ended"):
                await exhaust(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert not engine.is_ready
        with pytest.raises(EngineNotReadyError):
            await collect(engine, GenerateRequest(request_id="late", prompt_token_ids=TEXT, params=greedy(2)))


async def test_drain_lets_requests_finish_and_takes_no_new_ones(llama: Family) -> None:
    async with running(llama) as engine:
        task = asyncio.create_task(
            collect(engine, GenerateRequest(request_id="r", prompt_token_ids=TEXT, params=greedy(40)))
        )
        await until(lambda: engine.stats.num_running == 1)
        await engine.drain(30.0)
        assert len((await task)[0]) == 40
        assert not engine.is_ready
        with pytest.raises(EngineNotReadyError):
            await collect(engine, GenerateRequest(request_id="late", prompt_token_ids=TEXT, params=greedy(2)))


async def test_drain_gives_up_after_its_time(llama: Family) -> None:
    async with running(llama) as engine:
        stream = engine.generate(GenerateRequest(request_id="r", prompt_token_ids=TEXT, params=greedy(240)))
        await anext(stream)
        await engine.drain(0.0)
        with pytest.raises(EngineNotReadyError, match="shutting down"):
            await exhaust(stream)


async def test_model_is_not_there_before_the_start(llama: Family) -> None:
    engine = AsyncEngine(EngineSettings(model=str(llama.path)))
    assert not engine.is_ready
    with pytest.raises(EngineNotReadyError, match="still being loaded"):
        _ = engine.model
    await engine.stop()


async def test_start_says_why_it_fails(llama: Family) -> None:
    engine = AsyncEngine(EngineSettings(model=str(llama.path), kv_cache_memory=1000))
    with pytest.raises(EngineStartError, match="too few"):
        await engine.start()


def test_process_ends_when_its_server_does() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        assert EngineLoop(theirs).run() == 0


def test_process_ends_on_a_frame_that_is_too_long() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((frames.MAX_BODY_BYTES + 1).to_bytes(4, "big"))
        assert EngineLoop(theirs).run() == 0


def test_a_request_survives_the_trip() -> None:
    soft_prompt = SoftPromptSource(digest="d", num_virtual_tokens=2, is_key_values=True, path="/p", task_id=0)
    adapter = AdapterSource(digest="a", path="/a", config_path="/c", num_parameters=7)
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=[1, 2],
        params=SamplingParams(max_tokens=3, seed=2**63, stop_token_ids=(1, 2)),
        soft_prompt=soft_prompt,
        adapter=adapter,
        others=(Member(), Member(soft_prompt=soft_prompt, adapter=adapter)),
        salt="t",
        priority=-3,
        timeout=0.5,
    )
    frame = messages.encode_frame(request)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert messages.to_engine_decoder.decode(frame[4:]) == request


def test_events_and_outcomes_survive_the_trip() -> None:
    scored = [Logprobs(-0.5, [(3, -0.5)])]
    events = [
        TokenEvent(
            request_id="a",
            token_ids=[3],
            num_cached_tokens=16,
            logprobs=scored,
            queue_seconds=0.25,
            prefill_seconds=0.5,
            prompt_logprobs=[None, *scored],
            class_logits=[1.5, -2.0],
        ),
        TokenEvent(request_id="b", token_ids=[4], finish_reason=FinishReason.STOP, stop_token_id=4),
        *(TokenEvent(request_id=code, failure=RequestFailure(code, "the reason")) for code in ErrorCode),
    ]
    for message in (
        messages.StepOutputs(events=events, stats=EngineStats(num_running=2), num_received=3, has_work=True),
        messages.Inspected(1, Inspection(vocabulary_norm_mean=1.5)),
        messages.Inspected(2, RequestFailure(ErrorCode.FAILED, "the reason")),
    ):
        assert messages.from_engine_decoder.decode(messages.encode_frame(message)[4:]) == message


async def test_what_does_not_run_in_time_fails_and_the_others_go_on(llama: Family) -> None:
    async with running(llama, max_num_seqs=1) as engine:
        stream = engine.generate(GenerateRequest(request_id="long", prompt_token_ids=TEXT, params=greedy(200)))
        first = await anext(stream)
        assert first.queue_seconds is not None
        assert first.prefill_seconds is not None
        assert min(first.queue_seconds, first.prefill_seconds) >= 0
        with pytest.raises(WaitTimeoutError, match="in the queue"):
            await collect(
                engine, GenerateRequest(request_id="late", prompt_token_ids=TEXT, params=greedy(2), timeout=0.001)
            )
        second = await anext(stream)
        assert second.queue_seconds is None
        assert engine.stats.num_timeouts == 1
        await stream.aclose()


def test_the_loop_sleeps_until_the_next_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert EngineLoop(theirs)._wait(0.01) is None
