"""Waiting for what another task, thread or process does."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable

import httpx

PAUSE_SECONDS = 0.01


def seconds_until(condition: Callable[[], object], limit: float, *, pause: float = PAUSE_SECONDS) -> float:
    """Seconds until a condition held; ``limit`` if it did not hold by then."""
    began = time.monotonic()
    while time.monotonic() - began < limit:
        if condition():
            return time.monotonic() - began
        time.sleep(pause)
    return limit


def wait_until(condition: Callable[[], object], seconds: float = 10.0, *, pause: float = PAUSE_SECONDS) -> float:
    """Seconds until a condition held.

    Raises:
        TimeoutError: If it did not hold in time.
    """
    waited = seconds_until(condition, seconds, pause=pause)
    if waited == seconds:
        raise TimeoutError(f"the condition did not come true in {seconds:g} seconds")
    return waited


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait on the event loop until a condition holds; it may be a coroutine function.

    Raises:
        TimeoutError: If it did not hold in time.
    """
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.001)


async def until_ready(http: httpx.AsyncClient) -> None:
    """Wait until a server is ready, as a client would."""

    async def is_ready() -> bool:
        return (await http.get("/ready")).status_code == 200

    await until(is_ready)
