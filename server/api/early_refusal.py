"""Early refusal: reject requests that would wait too long before routing, validation and tokenisation."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware
from server.api.inference.entry import is_batch_tier
from server.api.inference.request_record import begin_record
from server.api.keys.callers import caller_of
from server.api.operations import matched
from server.api.services import Services
from server.errors import OverloadedError, WaitTimeoutError


class _Fields(msgspec.Struct):
    """The fields of a body that an early refusal needs; msgspec skips the others."""

    model: str | None = None
    priority: int | None = None
    service_tier: str | None = None


class AdmissionMiddleware(HttpMiddleware):
    """Rejects requests for work of the model while their queue is too long, unless they are urgent.

    The endpoints check again, because a request may set a shorter time limit than the server.

    Args:
        app: The rest of the application.
        services: The server with the queue.
    """

    def __init__(self, app: ASGIApp, *, services: Services) -> None:
        super().__init__(app)
        self._services = services

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the queue, and the request only if the queue is too long."""
        operation = matched(scope).operation
        if operation is None or operation.work is None or self._is_open(scope):
            await self.app(scope, receive, send)
            return
        messages = await _read_body(receive)
        fields = _fields_of(messages)
        refusal = None if fields is None else self._refusal(scope, fields)
        if fields is None or refusal is None:
            await self.app(scope, _replayed(messages, receive), send)
            return
        record = begin_record(Request(scope), self._services, model=fields.model, text=lambda: None)
        await record.fail(refusal, self._services.metrics).response()(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return self._services.admission.is_open(caller_of(Request(scope)).tenant, self._limit)

    def _refusal(self, scope: Scope, fields: _Fields) -> OverloadedError | WaitTimeoutError | None:
        try:
            is_batch = is_batch_tier(fields.service_tier)
            self._services.admission_of(is_batch=is_batch).check(
                caller_of(Request(scope)).tenant, None if is_batch else self._limit, priority=fields.priority or 0
            )
        except (OverloadedError, WaitTimeoutError) as error:
            return error
        return None

    @property
    def _limit(self) -> float | None:
        return self._services.max_wait(None)


async def _read_body(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """A receive channel that replays messages read from another."""
    left = iter(messages)

    async def receive_replayed() -> Message:
        return next(left, None) or await receive()

    return receive_replayed


def _fields_of(messages: list[Message]) -> _Fields | None:
    """The fields of a body; None if the client disconnected, or the route should report what is wrong."""
    if messages[-1]["type"] != "http.request":
        return None
    body = b"".join(message.get("body", b"") for message in messages)
    try:
        return msgspec.json.decode(body, type=_Fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
