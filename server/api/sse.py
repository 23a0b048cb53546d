"""Server-sent events: one response class that streams chunks, notices the client going, and reports late errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ClientDisconnected, unless_disconnected
from server.api.errors import ErrorReply

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def event(payload: msgspec.Struct) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class EventStream(Response):
    """Sends events as they come; the response begins with the first of them.

    An error before that propagates to the exception handlers and becomes an ordinary error response. An error
    after it becomes one last event. A client that disconnects closes ``events`` at once.

    Args:
        events: Encoded events.
        late_headers: More headers, asked for when the first event is there.
        on_error: What the client is told of an error after the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        late_headers: Callable[[], Mapping[str, str]] = dict,
        on_error: Callable[[Exception], ErrorReply],
    ) -> None:
        # Not Response.__init__: that sets the length of an empty body.
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._late_headers = late_headers
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream the events, until they end or the client goes."""
        try:
            await unless_disconnected(receive, self._write(send))
        except ClientDisconnected:
            return  # nobody is left to answer

    async def _write(self, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    if not started:
                        started = True
                        self.headers.update(self._late_headers())
                        await send(
                            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        )
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if not started:
                raise
            last = b"data: " + self._on_error(error).body + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
