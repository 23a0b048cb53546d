"""Middleware for every request. Plain ASGI, because buffering wrappers break streams and disconnects."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence, Set

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import describe
from server.api.http.multipart import discard_rest
from server.api.inference.request_record import RequestRecord
from server.api.keys.callers import Caller
from server.api.keys.keys import ApiKeys
from server.api.operations import OPEN_PATHS, check_access, takes_tokens
from server.errors import ServerError
from server.metrics import Metrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""Incoming ids that are accepted: they cannot forge a log line or a header."""

MIN_BODY_RATE = 4096
"""Minimum rate of a long body, in bytes per second."""


class RequestIdMiddleware:
    """Gives every response an ``X-Request-ID``, every bug a 500 in the error shape, every request a record.

    Args:
        app: The rest of the application.
        metrics: Where errors are counted.
        observers: Callbacks that get the record of each finished request.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, observers: Sequence[Callable[[RequestRecord], None]] = ()
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        incoming = headers.get("x-request-id", "")
        request_id = incoming if _REQUEST_ID.fullmatch(incoming) else uuid.uuid4().hex
        record = RequestRecord(
            request_id=request_id,
            method=scope["method"],
            path=scope.get("raw_path", scope["path"].encode()).decode("latin-1"),
            traceparent=headers.get("traceparent"),
        )
        scope.setdefault("state", {}).update(request_id=request_id, record=record)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            reply = describe(error, request_id=request_id)
            self._metrics.count_error(reply.code)
            record.error = reply.code
            if started:
                raise  # the server closes the connection, which tells the client that the response is not whole
            await reply.response()(scope, receive, send_with_id)
        finally:
            record.total_seconds = time.monotonic() - record.started
            for observe in self._observers:
                observe(record)


class ApiKeyMiddleware:
    """Rejects requests without a valid key and scope, before their body is read.

    Args:
        app: The rest of the application.
        keys: The keys.
        metrics: Where errors are counted.
        open_paths: What needs no key.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, metrics: Metrics, open_paths: Set[str] = OPEN_PATHS) -> None:
        self._app = app
        self._open_paths = open_paths
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request's key."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                caller = self._keys.check(Headers(scope=scope).get("authorization"))
                scope["state"]["record"].tenant = caller.tenant
                check_access(caller, scope["method"], scope["path"])
            except (ServerError, HTTPException) as error:
                reply = describe(error, request_id=scope["state"]["request_id"])
                self._metrics.count_error(reply.code)
                scope["state"]["record"].error = reply.code
                await reply.response()(scope, receive, send)
                return
            scope["state"]["caller"] = caller
            if takes_tokens(scope["method"], scope["path"]) is not None:
                send = _with_limits(caller, send)
        await self._app(scope, receive, send)


def _with_limits(caller: Caller, send: Send) -> Send:
    """Add the key's remaining limits to the response's headers."""

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(caller.limiter.headers)
        await send(message)

    return send_with_limits


class BodyTimeoutMiddleware:
    """Ends a request whose body arrives too slowly; only time spent waiting for the client counts.

    Args:
        app: The rest of the application.
        seconds: How long may be waited; each byte that comes gives ``1 / MIN_BODY_RATE`` seconds of it back.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bound the time for one request's body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left, is_whole = self._seconds, False

        async def timely_receive() -> Message:
            nonlocal left, is_whole
            if is_whole:  # what is waited for now is the client's going
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(max(left, 0.0)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "the request body was not received in time", headers={"connection": "close"}
                ) from None
            # What came quickly buys no longer silence later: that would hold its memory for as long.
            left += len(message.get("body", b"")) / MIN_BODY_RATE - (time.monotonic() - began)
            left = min(left, self._seconds)
            is_whole = not message.get("more_body", False)
            return message

        await self._app(scope, timely_receive, send)


class BodyLimitMiddleware:
    """Limits the size of request bodies as they arrive; multipart uploads have separate limits.

    FastAPI passes an ``HTTPException`` out of ``receive`` on to the handlers as it is, and hides any other.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bound one request's body."""
        if scope["type"] != "http" or _is_upload(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        is_held_back = headers.get("expect", "").lower() == "100-continue"
        is_too_long = declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            has_rest = not is_held_back  # reading would ask the client to send it
            if not is_too_long:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= self._max_bytes:
                    return message
                has_rest = message.get("more_body", False)
            if has_rest:
                await discard_rest(_rest(receive))
            raise self._error()

        await self._app(scope, limited_receive, send)

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


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"] == "/v1/prompts")
