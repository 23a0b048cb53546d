"""Middleware for every request: ids and records, API keys, and the time and size of bodies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware
from server.api.http.multipart import discard_rest
from server.api.http.request_ids import request_id_of
from server.api.inference.request_record import RequestRecord
from server.api.keys.callers import IN_PROCESS_CALLER, Caller
from server.api.keys.sessions import Sessions
from server.api.operations import Operations, matched
from server.api.session_cookies import caller_by_cookie
from server.metrics.metrics import Metrics

MIN_BODY_RATE = 4096
"""Minimum rate of a long body, in bytes per second."""


class RequestIdMiddleware(HttpMiddleware):
    """Gives every request its operation, an id and a record, and every error raised here the error format.

    Args:
        app: The rest of the application.
        operations: Everything that is served.
        metrics: Where errors are counted.
        observers: Callbacks that get the record of each finished request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        operations: Operations,
        metrics: Metrics,
        observers: Sequence[Callable[[RequestRecord], None]] = (),
    ) -> None:
        super().__init__(app)
        self._operations = operations
        self._metrics = metrics
        self._observers = observers

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        headers = Headers(scope=scope)
        found = self._operations.match(scope["method"], scope["path"])
        request_id = request_id_of(headers.get("x-request-id", ""))
        record = RequestRecord(
            request_id=request_id,
            method=scope["method"],
            path=scope.get("raw_path", scope["path"].encode()).decode("latin-1"),
            traceparent=headers.get("traceparent"),
            is_polled=found.is_polled,
        )
        scope.setdefault("state", {}).update(request_id=request_id, record=record, matched=found)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            reply = record.fail(error, self._metrics)
            if started:
                raise  # the server closes the connection, so that the client notices the incomplete response
            await reply.response()(scope, receive, send_with_id)
        finally:
            record.total_seconds = time.monotonic() - record.started
            self._metrics.count_http(record.method, found.route, record.status)
            for observe in self._observers:
                observe(record)


class ApiKeyMiddleware(HttpMiddleware):
    """Rejects requests without a valid key and scope, before their body is read.

    Args:
        app: The rest of the application.
        sessions: The sessions of the console, each in place of a key, with the keys.
        open_metrics: Whether metrics need no key.
    """

    def __init__(self, app: ASGIApp, *, sessions: Sessions, open_metrics: bool = False) -> None:
        super().__init__(app)
        self._keys = sessions.keys
        self._sessions = sessions
        self._open_metrics = open_metrics

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key of one request."""
        found = matched(scope)
        if not (found.is_open or (self._open_metrics and found.is_metrics)):
            caller = scope.get(IN_PROCESS_CALLER) or self._authenticate(scope)
            record = scope["state"]["record"]
            record.tenant, record.key, record.key_name = caller.tenant, caller.name, caller.key_name
            found.check_access(caller)
            scope["state"]["caller"] = caller
            if found.operation is not None and found.operation.quota is not None:
                send = _with_limits(caller, send)
        await self.app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> Caller:
        """The caller of a request: by ``Authorization`` if it is there, otherwise by the cookie of a session."""
        authorization = Headers(scope=scope).get("authorization")
        by_cookie = None if authorization is not None else caller_by_cookie(scope, self._sessions)
        if by_cookie is not None:
            return by_cookie
        caller = self._keys.check(authorization)
        scope["state"]["is_current"] = lambda: self._keys.named(caller.name) is not None
        return caller


def _with_limits(caller: Caller, send: Send) -> Send:
    """Add the remaining limits of the key to the headers of the response."""

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(caller.limiter.headers)
        await send(message)

    return send_with_limits


class BodyTimeoutMiddleware(HttpMiddleware):
    """Ends a request whose body arrives too slowly; only time spent waiting for the client counts.

    Args:
        app: The rest of the application.
        seconds: Maximum time to wait, extended by ``1 / MIN_BODY_RATE`` seconds per received byte.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        super().__init__(app)
        self._seconds = seconds

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bound the time for the body of one request."""
        left, is_whole = self._seconds, False

        async def timely_receive() -> Message:
            nonlocal left, is_whole
            if is_whole:  # the caller waits for the client to disconnect
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(max(left, 0.0)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "the request body was not received in time", headers={"connection": "close"}
                ) from None
            # Fast data does not allow a longer pause later, during which the received data would stay in memory.
            left += len(message.get("body", b"")) / MIN_BODY_RATE - (time.monotonic() - began)
            left = min(left, self._seconds)
            is_whole = not message.get("more_body", False)
            return message

        await self.app(scope, timely_receive, send)


class BodyLimitMiddleware(HttpMiddleware):
    """Limits the size of request bodies as they arrive; uploads have a separate limit.

    Errors are raised as ``HTTPException``: FastAPI hides any other error raised by ``receive``.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bound the body of one request."""
        operation = matched(scope).operation
        if operation is not None and operation.is_upload:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        is_held_back = headers.get("expect", "").lower() == "100-continue"
        is_too_long = declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            has_rest = not is_held_back  # reading would make the client send it
            if not is_too_long:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= self._max_bytes:
                    return message
                has_rest = message.get("more_body", False)
            if has_rest:
                await discard_rest(_rest(receive))
            raise self._error()

        await self.app(scope, limited_receive, send)

    def _error(self) -> HTTPException:
        return HTTPException(
            413, f"the body is over the limit of {self._max_bytes} bytes", headers={"connection": "close"}
        )


async def _rest(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        more = bool(message.get("more_body", False))
        yield message.get("body", b"")
