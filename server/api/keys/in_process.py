"""Requests that the server sends to itself, as one of its callers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

from server.api.keys.callers import IN_PROCESS_CALLER, Caller

_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_MAX_ATTEMPTS = 5
"""Of requests that fail by a fault of the server. A full or restarting one (429, 503) is asked until it answers."""

_LONGEST_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A response.

    Attributes:
        status: HTTP status.
        headers: Headers by name in lower case.
        body: The body.
    """

    status: int
    headers: dict[str, str]
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes, caller: Caller, *, request_id: str | None = None) -> Reply:
    """Send a JSON body to a route of an application, through all of its middleware.

    Args:
        app: The application.
        path: Path of the route.
        body: JSON.
        caller: Who sends it; no API key is checked.
        request_id: Its X-Request-ID; None for a new one.
    """
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {},
        IN_PROCESS_CALLER: caller,
    }
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, found, parts = 500, dict[str, str](), list[bytes]()

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # it never disconnects
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            for name, value in message["headers"]:
                found[name.decode("latin-1").lower()] = value.decode("latin-1")
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return Reply(status, found, b"".join(parts))


async def post_until_answered(app: ASGIApp, path: str, body: Mapping[str, object], caller: Caller) -> Reply:
    """Send a request in the service tier ``batch``, again and again while the server is full or restarting.

    Args:
        app: The application.
        path: Path of the route.
        body: The JSON body, without its tier.
        caller: Who sends it.

    Returns:
        The answer, or the error that another attempt would not change.
    """
    content = json.dumps({**body, "service_tier": "batch"}).encode()
    pause, attempts = 0.05, 0
    while True:
        reply = await post(app, path, content, caller)
        attempts += reply.status not in (429, 503)
        if reply.status not in _RETRIED or attempts >= _MAX_ATTEMPTS:
            return reply
        with suppress(ValueError):
            pause = max(pause, min(float(reply.headers.get("retry-after", 0)), _LONGEST_PAUSE))
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
