"""The step loop reports that it is busy while a soft prompt is loaded, so that a load that hangs is detected."""

from __future__ import annotations

import socket
from unittest.mock import Mock

import msgspec
import pytest

from server.engine.llm_engine import LLMEngine
from server.engine.messages import Shutdown, StepOutputs, from_engine_decoder
from server.engine.process.engine_process import EngineLoop
from server.engine.stats import EngineStats
from server.engine.types import TokenEvent


@pytest.mark.parametrize(
    ("has_work", "is_loading", "is_busy"),
    [(False, False, False), (False, True, True), (True, False, True)],
)
def test_a_load_counts_as_work_for_the_watchdog(has_work: bool, is_loading: bool, is_busy: bool) -> None:
    near, far = socket.socketpair()
    with near, far:
        loop = EngineLoop(near)
        engine = Mock(
            spec=LLMEngine, has_work=has_work, is_loading=is_loading, idle_seconds=None, overlaps_host=False
        )
        engine.stats = EngineStats(num_blocks=1, block_size=1)

        def step() -> list[TokenEvent]:
            loop._inbox.put(Shutdown())
            return []

        engine.step = step
        loop._inbox.put(None)
        loop._loop(engine)
        frames = [loop._outbox.get_nowait() for _ in range(loop._outbox.qsize())]
    reported = [from_engine_decoder.decode(msgspec.Raw(frame[4:])) for frame in frames if frame is not None]
    assert all(isinstance(message, StepOutputs) for message in reported)
    last = reported[-1]
    assert isinstance(last, StepOutputs)
    assert last.has_work == is_busy
