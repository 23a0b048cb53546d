"""A task group raises the first error, and no task outlives it."""

from __future__ import annotations

import asyncio

import pytest

from server.api.task_group import task_group

pytestmark = pytest.mark.anyio


class Waiting:
    """A task that waits until it is cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.was_cancelled = False

    async def run(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.was_cancelled = True


async def fail(error: Exception) -> None:
    raise error


async def test_results_are_returned() -> None:
    async with task_group() as group:
        tasks = [group.create_task(asyncio.sleep(0, result)) for result in (1, 2)]
    assert [task.result() for task in tasks] == [1, 2]


async def test_the_first_error_of_a_task_is_raised_unchanged_and_cancels_the_others() -> None:
    waiting, cause = Waiting(), KeyError("cause")
    error = ValueError("first")
    error.__cause__ = cause
    with pytest.raises(ValueError, match="first") as raised:
        async with task_group() as group:
            group.create_task(waiting.run())
            group.create_task(fail(error))
            await asyncio.Event().wait()
    assert raised.value is error
    assert raised.value.__cause__ is cause
    assert waiting.was_cancelled


async def test_an_error_of_the_block_is_raised_unchanged_and_cancels_the_tasks() -> None:
    waiting = Waiting()
    with pytest.raises(ValueError, match="block"):
        async with task_group() as group:
            group.create_task(waiting.run())
            await waiting.begun.wait()
            raise ValueError("block")
    assert waiting.was_cancelled


async def test_a_cancellation_cancels_the_tasks_and_propagates() -> None:
    waiting = Waiting()

    async def grouped() -> None:
        async with task_group() as group:
            group.create_task(waiting.run())

    task = asyncio.create_task(grouped())
    await waiting.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waiting.was_cancelled
