"""What each request waits for until vLLM runs it, and how many wait. Plain data: no torch, no vllm."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class WaitsFor(Enum):
    """What a request that has not started waits for; the value ends a sentence about the time that it waited."""

    ADAPTER = "of waiting for a place for its adapter (--max-loras)"
    CONSTRAINT = "of waiting for its constraint to be compiled"
    SOFT_PROMPT = "of waiting for its soft prompt to be computed"
    TURN = "in the queue"
    """vLLM has it; it waits for blocks, for a slot or for its soft prompt's file."""


@dataclass(slots=True)
class Running:
    """A request that has not ended.

    Attributes:
        task: Serves it.
        arrival: Monotonic time in seconds.
        is_batch: Whether it is of the service tier ``batch``.
        waits_for: What it waits for, unless it has started.
        has_started: Whether vLLM has given it blocks.
        is_late: Whether it is cancelled because it did not start in time.
    """

    task: asyncio.Task[None]
    arrival: float
    is_batch: bool = False
    waits_for: WaitsFor = WaitsFor.TURN
    has_started: bool = False
    is_late: bool = False


def count_waiting(requests: Iterable[Running], num_queued: int) -> tuple[int, int]:
    """Waiting requests of the default tier, and of the tier ``batch``.

    Args:
        requests: All that have not ended.
        num_queued: Those in vLLM's queue after its newest step; it also holds preempted ones, whose tier it does not
            tell: they count as of the default tier.
    """
    num_started = num_new = 0
    waiting = [0, 0]
    for request in requests:
        if request.has_started:
            num_started += 1
            continue
        waiting[request.is_batch] += 1
        num_new += request.waits_for is WaitsFor.TURN
    # Requests that arrived after that step are not among the queued ones.
    num_preempted = min(max(0, num_queued - num_new), num_started)
    return waiting[0] + num_preempted, waiting[1]
