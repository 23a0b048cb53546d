"""The door: what a connection may send, how slowly, and for how long, before a request has begun.

uvicorn with httptools takes heads of any length and waits for them for ever; ``LimitedProtocol`` bounds both, the
number of connections, and how long an answer may lie unread. Bodies are bounded by the application's middleware.
It also refuses heads that RFC 9112 says to refuse, drops trailers, and declines offers to speak another protocol.
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
from typing import Any, NoReturn

import httptools

# Private classes: tests/api/http/test_uvicorn.py says what to do when they change.
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import ErrorReply, describe_status
from server.api.http.heads import HeadError, authority_of, check_head, framing_of
from server.api.http.origins import Origins
from server.api.http.refusal_log import Refusal

MAX_HEADERS = 128
"""Header lines of one request."""

MAX_PIPELINED = 16
"""Requests of one connection that may wait behind another's answer; thousands fit into one read, 2 KiB each."""

_BYTES_PER_CHUNK, _BYTES_PER_BYTE = 16, 3
"""What may come for each chunk of a body, and for each byte in it; the rest is bounded, as in Go's net/http."""

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
        origins: Origins whose pages may read the error.
    """

    max_connections: int
    max_head_bytes: int
    head_seconds: float
    stall_seconds: float
    on_refused: Callable[[Refusal], None]
    origins: Origins


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol within limits; ``limited`` makes the class that uvicorn is given."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _errors_only
        self._head_bytes = 0
        self._header_bytes = 0
        self._head_fault: HeadError | None = None
        self._num_trailers = 0
        self._excess_bytes = 0
        self._declined: bytes | None = None
        """The framing of a body whose request offers another protocol, from its head on; None where there is none."""
        self._is_declining = False
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
        if self._has_body_to_come:
            self._excess_bytes = max(0, self._excess_bytes) + len(data)
        else:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._head_bytes > self.limits.max_head_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._excess_bytes > self.limits.max_head_bytes:
            self._refuse(HTTPStatus.BAD_REQUEST, "the body's chunks are too small")

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                # RFC 9110, 7.8 lets a server ignore such an offer; httptools stops after the head.
                (num_parsed,) = offer.args
                data = data[num_parsed:]
                self._decline()
            except httptools.HttpParserError as error:
                self._head_fault = self._head_fault or _fault_of(error)
                self.send_400_response(str(error))
                return
            else:
                return

    def _decline(self) -> None:
        """Go on after a head with an offer of another protocol; httptools takes its request to have no body."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        if self._declined is not None:
            self._is_declining = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self._declined + b"\r\n\r\n")
            self._is_declining = False
            self._declined = None

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self._is_declining:
            return
        super().on_message_begin()
        self._header_bytes = self._num_trailers = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's target."""
        if self._is_declining:
            return
        super().on_url(url)
        if len(self.url) > self.limits.max_head_bytes:
            self._fail(HeadError(HTTPStatus.REQUEST_URI_TOO_LONG))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or drop a trailer: none is known here that would mean anything (RFC 9110, 6.5.1)."""
        if self._is_declining:
            return
        if self._has_body_to_come:
            self._num_trailers += 1
            if name.lower() == b"connection":
                self.cycle.keep_alive = False  # httptools takes it for a header, and may read nothing after it
        else:
            super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if (
            len(self.url) + self._header_bytes > self.limits.max_head_bytes
            or len(self.headers) + self._num_trailers > MAX_HEADERS
        ):
            self._fail(HeadError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))

    def on_headers_complete(self) -> None:
        """Begin a request."""
        if self._is_declining:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(HeadError(HTTPStatus.TOO_MANY_REQUESTS))
        version = self.parser.get_http_version()
        try:
            check_head(self.parser.get_method(), version, self.headers)
            authority = authority_of(self.url)
        except HeadError as fault:
            self._fail(fault)
        if authority is not None:
            self.headers[:] = [(name, authority if name == b"host" else value) for name, value in self.headers]
        if version == "1.0":
            self.expect_100_continue = False
        super().on_headers_complete()  # raises where the target is none that it understands: then none has begun
        if self.parser.should_upgrade():
            self._declined = framing_of(self.headers)
        if not self.pipeline:
            self._answered = self.cycle
        self._is_in_request = self._has_body_to_come = True
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_chunk_header(self) -> None:
        """Begin a chunk of a body."""
        self._excess_bytes -= _BYTES_PER_CHUNK

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._excess_bytes -= _BYTES_PER_BYTE * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request's body, unless it is the one that httptools does not see."""
        if self._declined is not None and not self._is_declining:
            return
        self._has_body_to_come = False
        self._excess_bytes = 0
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
        """Reject malformed HTTP and exceeded limits."""
        fault = self._head_fault or HeadError(HTTPStatus.BAD_REQUEST)
        self._refuse(fault.status, fault.reason)

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

    def _fail(self, fault: HeadError) -> NoReturn:
        """Give up parsing: httptools passes the error on without its class."""
        self._head_fault = fault
        raise fault

    def _refuse(self, status: HTTPStatus, reason: str | None = None) -> None:
        """Answer and close, where it would not be taken for the answer to another request."""
        if self.transport.is_closing():
            return
        reply = describe_status(status, reason)
        request_id = None
        is_of_the_one_that_runs = self._has_body_to_come and not (self.pipeline or self.cycle.response_started)
        if not self._is_in_request or is_of_the_one_that_runs:
            request_id = uuid.uuid4().hex
            self.transport.write(self._encoded(status, reply, request_id))
        self._tell(reply.code, reply.message, status=request_id and reply.status, request_id=request_id)
        self.transport.close()
        self._watch_writes()

    def _encoded(self, status: HTTPStatus, reply: ErrorReply, request_id: str) -> bytes:
        origin = next((value.decode("latin-1") for name, value in self.headers or () if name == b"origin"), None)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(reply.body)),
            "connection": "close",
            "x-request-id": request_id,
            **reply.headers,
            **self.limits.origins.headers_for(origin),
            **({"vary": "Origin"} if self.limits.origins else {}),
        }
        lines = [b"HTTP/1.1 %d %s" % (status.value, status.phrase.encode())]
        lines += [name + b": " + value for name, value in self.server_state.default_headers]
        lines += [f"{name}: {value}".encode("latin-1") for name, value in headers.items()]
        return b"\r\n".join([*lines, b"", reply.body])

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


def _fault_of(error: httptools.HttpParserError) -> HeadError | None:
    """The fault that httptools found, where that is more than that it is no HTTP/1.1; it has no classes for these."""
    if any(words in str(error) for words in ("HTTP version", "PRI/Upgrade")):
        return HeadError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    return None
