"""Limits of connections: the size of a request's head, and the time until it is received.

uvicorn with httptools accepts heads of any length and waits for them forever. ``LimitedProtocol`` bounds both, the
number of connections, and how long a response may stay unread. Bodies are bounded by the application's middleware.
It also rejects heads that RFC 9112 requires to reject, drops trailers, and declines protocol upgrades.
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
"""Maximum number of header lines of one request."""

MAX_PIPELINED = 16
"""Maximum number of pipelined requests of a connection. One read may contain thousands, which cost 2 KiB each."""

_BYTES_PER_CHUNK, _BYTES_PER_BYTE = 16, 3
"""Allowed bytes per chunk of a body, and per byte in it; any excess is bounded, as in Go's net/http."""

_errors_only = logging.getLogger("uvicorn.error.connections")
"""uvicorn logs a warning per malformed request, without a limit. ``RefusalLog`` logs them instead."""
_errors_only.setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """The limits of a server's connections.

    Attributes:
        max_connections: Maximum number of open connections.
        max_head_bytes: Maximum size of the request line and headers of a request.
        head_seconds: Maximum time from the start of a connection, or the first byte of a request, to the end of the
            head.
        stall_seconds: Maximum time in which a client reads nothing of a response.
        on_refused: Called when a connection is rejected or ended.
        origins: Origins whose pages may read the error.
    """

    max_connections: int
    max_head_bytes: int
    head_seconds: float
    stall_seconds: float
    on_refused: Callable[[Refusal], None]
    origins: Origins


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits; ``limited`` makes the class for uvicorn."""

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
        """The framing of the body of a request that offers another protocol; None if there is no such body."""
        self._is_declining = False
        self._is_in_request = False
        self._has_body_to_come = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_unread = 0
        self._answered: RequestResponseCycle | None = None
        """The request being answered, or the last one; ``cycle`` is the newest request, which may be pipelined."""

    # Beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or reject it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection, and notify the request being answered; uvicorn notifies only the newest one."""
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
        """Parse received bytes within the limits of a head."""
        if self.transport.is_closing():
            return
        if not self._is_in_request:
            # Bytes after a response, even the rest of a rejected body, must become another request in time.
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
        """Continue after a head that offers another protocol; httptools assumes that the request has no body."""
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
        """Receive a part of the request target."""
        if self._is_declining:
            return
        super().on_url(url)
        if len(self.url) > self.limits.max_head_bytes:
            self._fail(HeadError(HTTPStatus.REQUEST_URI_TOO_LONG))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive a header, or drop a trailer: no trailer has a meaning here (RFC 9110, 6.5.1)."""
        if self._is_declining:
            return
        if self._has_body_to_come:
            self._num_trailers += 1
            if name.lower() == b"connection":
                self.cycle.keep_alive = False  # httptools treats it as a header, and may stop reading after it
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
        super().on_headers_complete()  # raises for a malformed target; then no request has begun
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
        """Receive a part of a body."""
        self._excess_bytes -= _BYTES_PER_BYTE * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body of a request, unless httptools does not know of the body."""
        if self._declined is not None and not self._is_declining:
            return
        self._has_body_to_come = False
        self._excess_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Continue with the next request, and watch unread bytes if the connection closes."""
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
        """End a connection without another request."""
        super().timeout_keep_alive_handler()
        self._watch_writes()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._miss_head)

    def _miss_head(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        elif not self.transport.is_closing():  # no request, so no response
            self._report("request_timeout", "nothing was asked in time")
            self.transport.close()

    def _fail(self, fault: HeadError) -> NoReturn:
        """Stop parsing. The fault is kept because httptools raises the error without its class."""
        self._head_fault = fault
        raise fault

    def _refuse(self, status: HTTPStatus, reason: str | None = None) -> None:
        """Close the connection, with a response unless it would be taken for another request's response."""
        if self.transport.is_closing():
            return
        reply = describe_status(status, reason)
        request_id = None
        is_for_current_request = self._has_body_to_come and not (self.pipeline or self.cycle.response_started)
        if not self._is_in_request or is_for_current_request:
            request_id = uuid.uuid4().hex
            self.transport.write(self._encoded(status, reply, request_id))
        self._report(reply.code, reply.message, status=request_id and reply.status, request_id=request_id)
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

    def _report(self, code: str, reason: str, **known: Any) -> None:
        self.limits.on_refused(Refusal(code=code, reason=reason, client=self.client and self.client[0], **known))

    # Unread responses

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._watch_writes()

    def _watch_writes(self) -> None:
        if self._write_timer is None:
            self._num_unread = self._count_unread()
            if self._num_unread:
                self._write_timer = self.loop.call_later(self.limits.stall_seconds, self._check_writes)

    def _check_writes(self) -> None:
        """Abort the connection if the client has read nothing since the last check, which ends its requests."""
        self._write_timer = None
        is_waiting = self.flow.write_paused or self.transport.is_closing()
        if is_waiting and self._count_unread() >= self._num_unread:
            state = {} if self._answered is None else self._answered.scope.get("state", {})
            self._report(
                "client_stalled",
                "the client takes nothing of its answer",
                request_id=state.get("request_id"),
                tenant=state["caller"].tenant if "caller" in state else None,
            )
            self.transport.abort()
        elif is_waiting:
            self._watch_writes()

    def _count_unread(self) -> int:
        """Bytes that the client has not acknowledged, in our buffer and in the kernel's, which may hold megabytes."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        waiting = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * 4) if descriptor >= 0 else b""
        return self.transport.get_write_buffer_size() + int.from_bytes(waiting, sys.byteorder)


def limited(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """The protocol for one server."""

    class Protocol(LimitedProtocol):
        """The protocol with its limits; uvicorn needs a class."""

    Protocol.limits = limits
    return Protocol


def _fault_of(error: httptools.HttpParserError) -> HeadError | None:
    """The fault that httptools found, if it is not just malformed HTTP; httptools has no classes for these."""
    if any(words in str(error) for words in ("HTTP version", "PRI/Upgrade")):
        return HeadError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    return None
