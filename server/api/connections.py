"""The door: what a connection may send, how slowly, and for how long, before a request has begun.

uvicorn with httptools takes heads of any length and waits for them for ever; ``LimitedProtocol`` bounds both, the
number of connections, and how long an answer may lie unread. Bodies are bounded by the application's middleware.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import ErrorReply, describe_status
from server.api.refusal_log import Refusal

MAX_HEADERS = 128
"""Header lines of one request."""

MAX_PIPELINED = 16
"""Requests of one connection that may wait behind another's answer; thousands fit into one read, 2 KiB each."""

_errors_only = logging.getLogger("uvicorn.error.connections")
"""uvicorn's protocol warns of each request that is no HTTP, without a bound; those have a line of our own."""
_errors_only.setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one server's connections are held to.

    Attributes:
        max_connections: Open at once.
        max_head_bytes: Request line and headers of one request.
        head_seconds: From a connection's beginning, or a request's first byte, to the end of its head.
        stall_seconds: How long an answer's bytes may lie without the client taking any of them.
        on_refused: Told when a connection is refused or ended.
    """

    max_connections: int
    max_head_bytes: int
    head_seconds: float
    stall_seconds: float
    on_refused: Callable[[Refusal], None]


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within limits; ``limited`` makes the class that uvicorn is given."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _errors_only
        self._head_bytes = 0
        self._header_bytes = 0
        self._head_fault: HTTPStatus | None = None
        self._is_in_request = False
        self._has_body_to_come = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_unread = 0
        self._answered: RequestResponseCycle | None = None
        """The request whose answer is under way or done last; ``cycle`` is the newest, which may wait behind it."""

    # Beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and tell the request that is being answered, which uvicorn only tells the newest."""
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    # Heads

    def data_received(self, data: bytes) -> None:
        """Parse what has come, within the limits of a head."""
        if self.transport.is_closing():
            return
        if not self._is_in_request:
            # What follows an answer, the rest of a refused body included, has to become another request in time.
            self._expect_head()
        if not self._has_body_to_come:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self.limits.max_head_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's target."""
        super().on_url(url)
        if len(self.url) > self.limits.max_head_bytes:
            self._head_fault = HTTPStatus.REQUEST_URI_TOO_LONG
            raise ValueError("the target is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if len(self.url) + self._header_bytes > self.limits.max_head_bytes or len(self.headers) > MAX_HEADERS:
            self._head_fault = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise ValueError("the headers are too large")

    def on_headers_complete(self) -> None:
        """Begin a request."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._head_fault = HTTPStatus.TOO_MANY_REQUESTS
            raise ValueError("too many requests wait")
        super().on_headers_complete()  # raises where the target is none that it understands: then none has begun
        if not self.pipeline:
            self._answered = self.cycle
        self._is_in_request = self._has_body_to_come = True
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_message_complete(self) -> None:
        """End a request's body."""
        self._has_body_to_come = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on to the next request; what the client has still to read is looked after."""
        self._is_in_request = bool(self.pipeline)
        if self.pipeline:
            self._answered, _ = self.pipeline[-1]
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writes()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or more of it than is taken."""
        self._refuse(self._head_fault or HTTPStatus.BAD_REQUEST)

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that sends no other request."""
        super().timeout_keep_alive_handler()
        self._watch_writes()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._miss_head)

    def _miss_head(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        elif not self.transport.is_closing():  # nothing was asked, so nothing is answered
            self._tell("request_timeout", "nothing was asked in time")
            self.transport.close()

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer and close, where it would not be taken for the answer to another request."""
        if self.transport.is_closing():
            return
        reply = describe_status(status)
        request_id = None
        is_of_the_one_that_runs = self._has_body_to_come and not (self.pipeline or self.cycle.response_started)
        if not self._is_in_request or is_of_the_one_that_runs:
            request_id = uuid.uuid4().hex
            self.transport.write(_encoded(status, reply, request_id))
        self._tell(reply.code, reply.message, status=request_id and reply.status, request_id=request_id)
        self.transport.close()
        self._watch_writes()

    def _tell(self, code: str, reason: str, **known: Any) -> None:
        self.limits.on_refused(Refusal(code=code, reason=reason, client=self.client and self.client[0], **known))

    # Answers that nobody reads

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._watch_writes()

    def _watch_writes(self) -> None:
        if self._write_timer is None:
            self._num_unread = self._count_unread()
            if self._num_unread:
                self._write_timer = self.loop.call_later(self.limits.stall_seconds, self._look_at_writes)

    def _look_at_writes(self) -> None:
        """Give a client up that has taken nothing since the last look; what waits for its reading ends at once."""
        self._write_timer = None
        is_waiting = self.flow.write_paused or self.transport.is_closing()
        if is_waiting and self._count_unread() >= self._num_unread:
            state = {} if self._answered is None else self._answered.scope.get("state", {})
            self._tell(
                "client_stalled",
                "the client takes nothing of its answer",
                request_id=state.get("request_id"),
                tenant=state["caller"].tenant if "caller" in state else None,
            )
            self.transport.abort()
        elif is_waiting:
            self._watch_writes()

    def _count_unread(self) -> int:
        """Bytes that the client's machine has not acknowledged, here and in the kernel, which may hold megabytes."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        waiting = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * 4) if descriptor >= 0 else b""
        return self.transport.get_write_buffer_size() + int.from_bytes(waiting, sys.byteorder)


def limited(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """The protocol for one server."""

    class Protocol(LimitedProtocol):
        """The protocol with its limits, as uvicorn wants a class."""

    Protocol.limits = limits
    return Protocol


def _encoded(status: HTTPStatus, reply: ErrorReply, request_id: str) -> bytes:
    body = reply.body
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        f"x-request-id: {request_id}",
        *(f"{name}: {value}" for name, value in reply.headers.items()),
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body
