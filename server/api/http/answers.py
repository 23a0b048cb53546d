"""What every answer carries, and when a connection cannot go on after one."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROTECTIVE_HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
)
"""No answer is taken for another type than it has, tells other sites its address, or is embedded in their pages."""


class ExpectMiddleware:
    """Closes the connection after an answer that comes instead of ``100 Continue``.

    The client may then send its body or not, and the next request could not be told from it (RFC 9110, 10.1.1).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or "expect" not in Headers(scope=scope):
            await self._app(scope, receive, send)
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

        await self._app(scope, noted_receive, closing_send)
