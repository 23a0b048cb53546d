"""How many requests wait, before vLLM has them and in its queue."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.vllm.waiting import Running, WaitsFor, count_waiting

pytestmark = pytest.mark.anyio


async def _nothing() -> None:
    """What a request of these tests does."""


async def requests_of(*kinds: tuple[WaitsFor | None, bool]) -> list[Running]:
    """Requests that wait for something, or have started (None), each with whether it is of the tier batch."""
    task = asyncio.create_task(_nothing())
    await task
    return [
        Running(task, 0.0, is_batch, waits_for or WaitsFor.TURN, has_started=waits_for is None)
        for waits_for, is_batch in kinds
    ]


@pytest.mark.parametrize("reason", [reason for reason in WaitsFor if reason is not WaitsFor.TURN])
async def test_what_vllm_does_not_have_yet_waits(reason: WaitsFor) -> None:
    assert count_waiting(await requests_of((reason, False), (None, False)), 0) == (1, 0)
    assert count_waiting(await requests_of((reason, True), (None, True)), 0) == (0, 1)


async def test_queued_requests_are_counted_once_and_by_tier() -> None:
    turn = WaitsFor.TURN
    requests = await requests_of((turn, False), (turn, False), (turn, True), (WaitsFor.ADAPTER, False), (None, False))
    assert count_waiting(requests, 3) == (3, 1)
    # Two of them arrived after the step that was reported.
    assert count_waiting(requests, 1) == (3, 1)


async def test_preempted_requests_wait_too() -> None:
    requests = await requests_of((None, False), (None, False), (WaitsFor.TURN, False))
    assert count_waiting(requests, 2) == (2, 0)


async def test_an_engine_without_requests_has_none_that_wait() -> None:
    """Without a step, vLLM does not report that a queued request was aborted."""
    assert count_waiting([], 2) == (0, 0)
    assert count_waiting(await requests_of((WaitsFor.ADAPTER, False)), 2) == (1, 0)


def test_each_reason_completes_the_sentence_of_a_timeout() -> None:
    assert all(reason.value.startswith(("of waiting for", "in the queue")) for reason in WaitsFor)
