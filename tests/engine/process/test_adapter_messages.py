"""What the API process sends to an engine for adapters, and what it refuses without the capability."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from server.config import EngineSettings
from server.engine.messages import (
    AdapterInspection,
    InspectAdapter,
    Inspected,
    InspectedModule,
    PinAdapter,
    UnpinAdapter,
    encoder,
    from_engine_decoder,
    to_engine_decoder,
)
from server.engine.process.async_engine import AsyncEngine
from server.engine.types import AdapterSource, Capability, GenerateRequest, Inspection
from server.errors import UnsupportedByEngineError
from tests.engine.process.test_restarts import MODEL, SOURCE, Launcher
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ADAPTER = AdapterSource(digest="a", path="/nowhere", config_path="/nowhere/either", num_parameters=64)
MODULE = InspectedModule(name="q", rank=2, scale=0.5, frobenius_norm=2.0, spectral_norm=1.0, share=0.25)


@asynccontextmanager
async def engine_with(*capabilities: Capability) -> AsyncIterator[tuple[AsyncEngine, Launcher]]:
    launcher = Launcher()
    launcher.script = [msgspec.structs.replace(MODEL, capabilities=capabilities)] * 2
    engine = AsyncEngine(EngineSettings(model="tiny"), launch=launcher.launch, sleep=launcher.sleep)
    await engine.start()
    try:
        yield engine, launcher
    finally:
        await engine.stop()


async def test_a_pair_is_prepared_by_one_request() -> None:
    async with engine_with(Capability.ADAPTERS) as (engine, launcher):
        await engine.prepare(SOURCE, ADAPTER)
        (sent,) = launcher.processes[0].sent
        assert isinstance(sent, GenerateRequest)
        assert (sent.soft_prompt, sent.adapter) == (SOURCE, ADAPTER)


async def test_pins_of_adapters_outlive_the_process() -> None:
    async with engine_with(Capability.ADAPTERS) as (engine, launcher):
        engine.pin(ADAPTER)
        launcher.processes[0].die()
        await until(lambda: len(launcher.processes) == 2 and engine.is_ready)
        engine.unpin(ADAPTER)
        assert launcher.processes[0].sent == [PinAdapter(ADAPTER)]
        assert launcher.processes[1].sent == [PinAdapter(ADAPTER), UnpinAdapter(ADAPTER)]


async def test_an_inspection_of_an_adapter_is_answered_by_its_modules() -> None:
    async with engine_with(Capability.ADAPTERS, Capability.INSPECTION) as (engine, launcher):
        process = launcher.processes[0]
        for outcome in (AdapterInspection([MODULE]), Inspection()):
            asked = asyncio.create_task(engine.inspect_adapter(ADAPTER))
            await until(lambda: process.sent and isinstance(process.sent[-1], InspectAdapter))
            sent = process.sent.pop()
            assert isinstance(sent, InspectAdapter)
            assert sent.adapter == ADAPTER
            process.reply(Inspected(sent.inspection_id, outcome))
            if isinstance(outcome, AdapterInspection):
                assert await asked == outcome
            else:
                with pytest.raises(TypeError, match="inspection of a soft prompt"):
                    await asked


@pytest.mark.parametrize("lacking", [Capability.ADAPTERS, Capability.INSPECTION])
async def test_an_engine_that_cannot_inspect_adapters_is_not_asked(lacking: Capability) -> None:
    async with engine_with(*(one for one in Capability if one is not lacking)) as (engine, launcher):
        with pytest.raises(UnsupportedByEngineError, match=f"capability {lacking.value}"):
            await engine.inspect_adapter(ADAPTER)
        assert launcher.processes[0].sent == []


async def test_an_engine_without_adapters_prepares_none() -> None:
    async with engine_with(Capability.INSPECTION) as (engine, launcher):
        with pytest.raises(UnsupportedByEngineError, match="LoRA adapters"):
            await engine.prepare(None, ADAPTER)
        assert launcher.processes[0].sent == []


async def test_messages_of_adapters_survive_their_encoding() -> None:
    for message in (PinAdapter(ADAPTER), UnpinAdapter(ADAPTER), InspectAdapter(3, ADAPTER)):
        assert to_engine_decoder.decode(encoder.encode(message)) == message
    answer = Inspected(3, AdapterInspection([MODULE]))
    assert from_engine_decoder.decode(encoder.encode(answer)) == answer
