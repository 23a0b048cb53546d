"""The headers of every response, and when a connection closes after one."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware

PROTECTIVE_HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
)
"""Browsers do not guess the type of a response, send its URL to other sites, or embed it in their pages."""


class ExpectMiddleware(HttpMiddleware):
    """Closes the connection after a response that is sent instead of ``100 Continue``.

    The client may or may not send its body then, which cannot be distinguished from the next request (RFC 9110,
    10.1.1).
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if "expect" not in Headers(scope=scope):
            await self.app(scope, receive, send)
            return
        is_read = False

        async def noted_receive() -> Message:
            nonlocal is_read
            is_read = True
            return await receive()

        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self.app(scope, noted_receive, closing_send)
