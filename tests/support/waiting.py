"""Waiting for another task, thread or process."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

PAUSE_SECONDS = 0.01


def seconds_until(condition: Callable[[], object], limit: float, *, pause: float = PAUSE_SECONDS) -> float:
    """Wait until a condition holds; returns the seconds, or ``limit`` if it did not hold in time."""
    began = time.monotonic()
    while time.monotonic() - began < limit:
        if condition():
            return time.monotonic() - began
        time.sleep(pause)
    return limit


def wait_until(condition: Callable[[], object], seconds: float = 10.0, *, pause: float = PAUSE_SECONDS) -> float:
    """Wait until a condition holds; returns the seconds.

    Raises:
        TimeoutError: If it did not hold in time.
    """
    waited = seconds_until(condition, seconds, pause=pause)
    if waited == seconds:
        raise TimeoutError(f"the condition did not come true in {seconds:g} seconds")
    return waited


async def until(condition: Callable[[], object | Awaitable[object]], seconds: float = 20.0) -> None:
    """Wait in the event loop until a condition holds; it may be asynchronous.

    Raises:
        TimeoutError: If it does not hold within ``seconds``.
    """
    async with asyncio.timeout(seconds):
        while True:
            holds = condition()
            if inspect.isawaitable(holds):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.001)
