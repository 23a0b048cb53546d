"""Cancellation of a request's work when its client disconnects."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from server.api.task_group import task_group

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for the access log; the client has disconnected."""


class ClientDisconnected(Exception):  # noqa: N818 - an event, not a fault
    """The client closed the connection before the work was done."""


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Await ``work``, and cancel it as soon as the client disconnects.

    Args:
        receive: The request's ASGI channel, its body already read.
        work: What to do for the client. It has ended, cleanup included, when this returns or raises.

    Raises:
        ClientDisconnected: If the client disconnected first.
    """
    async with task_group() as group:
        watcher = group.create_task(_wait_for_disconnect(receive))
        result = await work
        watcher.cancel()
    return result


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnected
