"""Server-sent events: a response that streams chunks, ends with its client, and reports late errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.errors import ErrorReply
from server.api.http.disconnect import ClientDisconnected, unless_disconnected
from server.api.task_group import task_group

DONE = b"data: [DONE]\n\n"

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip. It keeps proxies from closing a connection that seems dead."""

KEEP_ALIVE_SECONDS = 15.0
"""Silence after which a comment is sent."""

_encoder = msgspec.json.Encoder()


def event(payload: msgspec.Struct) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def named_events(description: str) -> dict[str, Any]:
    """The content of a response in OpenAPI: events with a name and JSON."""
    properties = {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}}
    schema = {"type": "object", "description": description, "required": ["data"], "properties": properties}
    return {EventStream.media_type: {"schema": schema}}


class EventStream(Response):
    """Sends events as they arrive. The response begins with the first event, or after a long wait for it.

    An error before the response begins is raised, and becomes an ordinary error response. A later error becomes the
    last event. If the client disconnects, ``events`` is closed at once.

    Bytes that a client does not read wait in the connection's buffer (64 KiB) and the kernel's. When both are full,
    no events are taken from the engine's queue, which is bounded by the request's number of tokens. So memory is
    bounded, and after ``stall_seconds`` the stream ends.

    Args:
        events: Encoded events.
        late_headers: Returns more headers when the response begins.
        on_error: Describes an error after the response has begun.
        stall_seconds: How long a client may leave full buffers unread; then it counts as disconnected.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        late_headers: Callable[[], Mapping[str, str]] = dict,
        on_error: Callable[[Exception], ErrorReply],
        stall_seconds: float,
    ) -> None:
        # Not Response.__init__: that sets the length of an empty body.
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._late_headers = late_headers
        self._on_error = on_error
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream the events until they end or the client disconnects."""
        try:
            await unless_disconnected(receive, self._write(send))
        except ClientDisconnected:
            return  # no client is left to respond to

    async def _write(self, send: Send) -> None:
        wire = _Wire(send, self._start, self._stall_seconds)
        async with task_group() as group:
            watcher = group.create_task(wire.watch())
            await self._send_all(wire)
            watcher.cancel()

    async def _send_all(self, wire: _Wire) -> None:
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    await wire.send(chunk)
        except Exception as error:
            if not wire.started:
                raise
            await wire.send(b"data: " + self._on_error(error).body + b"\n\n")
        await wire.send(b"", more=False)

    def _start(self) -> Message:
        self.headers.update(self._late_headers())
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}


class _Wire:
    """The connection to one client: begins the response, and records when it last sent something.

    Attributes:
        started: Whether the response has begun.
    """

    def __init__(self, send: Send, start: Callable[[], Message], stall_seconds: float) -> None:
        self.started = False
        self._send = send
        self._start = start
        self._stall_seconds = stall_seconds
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()
        self._is_sending = False
        self._turn = asyncio.Lock()

    async def send(self, chunk: bytes, *, more: bool = True) -> None:
        """Send a part of the body; waits while the client does not read."""
        async with self._turn:
            self._last = self._clock()
            self._is_sending = True
            if not self.started:
                self.started = True
                await self._send(self._start())
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})
            self._is_sending = False
            self._last = self._clock()

    async def watch(self) -> None:
        """Send comments during silences.

        Raises:
            ClientDisconnected: If the client has stopped reading.
        """
        while True:
            await asyncio.sleep(min(KEEP_ALIVE_SECONDS, self._stall_seconds) / 2)
            silent = self._clock() - self._last
            if self._is_sending:
                if silent >= self._stall_seconds:
                    raise ClientDisconnected
            elif silent >= KEEP_ALIVE_SECONDS / 2:
                with suppress(TimeoutError):  # the next iteration handles a buffer that has just filled
                    async with asyncio.timeout(self._stall_seconds):
                        await self.send(KEEP_ALIVE)
