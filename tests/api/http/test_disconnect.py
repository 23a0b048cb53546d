"""A request's work against its client's disconnect."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.api.http.disconnect import ClientDisconnected, unless_disconnected

pytestmark = pytest.mark.anyio


class Client:
    """The receiving half of a connection whose body has been read."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.num_asked = 0

    async def receive(self) -> dict[str, Any]:
        self.num_asked += 1
        if self.num_asked == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_the_result_of_the_work_is_returned() -> None:
    before = asyncio.all_tasks()
    assert await unless_disconnected(Client().receive, asyncio.sleep(0, "done")) == "done"
    assert asyncio.all_tasks() == before


async def test_an_error_of_the_work_is_raised_unchanged() -> None:
    error = ValueError("broken")

    async def work() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(ValueError, match="broken") as raised:
        await unless_disconnected(Client().receive, work())
    assert raised.value is error


@pytest.mark.parametrize("fails", [False, True])
async def test_a_disconnect_cancels_the_work_and_waits_for_its_cleanup(fails: bool) -> None:
    client, ended = Client(), []

    async def work() -> None:
        client.gone.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleanup")
            if fails:
                raise ValueError("in the cleanup")

    with pytest.raises(ClientDisconnected):
        await unless_disconnected(client.receive, work())
    assert ended == ["cleanup"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_cancels_the_work() -> None:
    begun, ended = asyncio.Event(), []

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleanup")

    task = asyncio.create_task(unless_disconnected(Client().receive, work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cleanup"]
