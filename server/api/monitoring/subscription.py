"""Streams of events that clients stay subscribed to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from starlette.requests import Request

from server.api.errors import ErrorReply, describe
from server.api.http.sse import EventStream
from server.api.inference.request_record import record_of
from server.api.services import Services
from server.errors import OverloadedError

MAX_SUBSCRIBERS = 64


@contextmanager
def counted(services: Services) -> Iterator[None]:
    """Count a subscriber until the block ends."""
    services.num_subscribers += 1
    try:
        yield
    finally:
        services.num_subscribers -= 1


def subscription(request: Request, services: Services, events: AsyncGenerator[bytes, None]) -> EventStream:
    """A response that streams events, which are made under ``counted``, to a subscriber.

    Raises:
        OverloadedError: If there are ``MAX_SUBSCRIBERS`` already.
    """
    if services.num_subscribers >= MAX_SUBSCRIBERS:
        raise OverloadedError(f"{MAX_SUBSCRIBERS} clients are subscribed already; try again later")

    def describe_late(error: Exception) -> ErrorReply:
        reply = describe(error, request_id=request.state.request_id)
        services.metrics.count_error(reply.code)
        record_of(request).error = reply.code
        return reply

    return EventStream(events, on_error=describe_late, stall_seconds=services.settings.http.stall_timeout)
