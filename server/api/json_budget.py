"""Limits on the number of values in a JSON body, counted before parsing.

Parsing, validating and freeing a million values takes a second, during which the event loop is blocked.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from server.api.http.http_middleware import HttpMiddleware
from server.api.operations import Operation, matched

MOST_TOKENS = 300_000
"""Maximum number of values of a body that may hold texts as token ids."""

MOST_VALUES = 65_536
"""Maximum number of values of any other body."""

MOST_CONTAINERS = 32_768
"""Maximum number of lists and objects, which cost more than numbers and keep the garbage collector busy."""

MOST_MEMBERS = 65_536
"""Maximum number of fields of all objects."""


def most_values(operation: Operation | None) -> int:
    """Maximum number of values of an operation's body."""
    return MOST_TOKENS if operation is not None and operation.takes_token_ids else MOST_VALUES


def num_values(body: bytes, most: int) -> int:
    """An upper bound of the number of values in a JSON text; ``most + 1`` if there are more.

    Each value but the first follows a comma or the opening of a list or an object. Those within strings do not count,
    unless the strings alone are too many.
    """
    if _num_openings(body) < most:
        return _num_openings(body) + 1
    # Without escapes, every second part between quotes is a string.
    rest = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if rest.count(b'"') // 2 > 2 * most:  # a value has a key at most
        return most + 1
    return min(_num_openings(b"".join(rest.split(b'"')[::2])), most) + 1


def is_over(body: bytes, most: int) -> bool:
    """Whether a JSON text exceeds the limit of values, of lists and objects, or of fields."""
    if _is_small(body, most):
        return False
    rest = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if rest.count(b'"') // 2 > 2 * most:
        return True
    return not _is_small(b"".join(rest.split(b'"')[::2]), most)


def _is_small(text: bytes, most: int) -> bool:
    containers = text.count(b"[") + text.count(b"{")
    return containers <= MOST_CONTAINERS and containers + text.count(b",") < most and text.count(b":") <= MOST_MEMBERS


def _num_openings(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


class JsonBudgetMiddleware(HttpMiddleware):
    """Rejects JSON bodies with too many values. Other content types are not parsed as JSON."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the values of one body when all of it was received."""
        if "json" not in Headers(scope=scope).get("content-type", "").lower():
            await self.app(scope, receive, send)
            return
        most = most_values(matched(scope).operation)
        pieces: list[bytes] = []
        is_whole = False

        async def counted_receive() -> Message:
            nonlocal is_whole
            message = await receive()
            if is_whole or message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if is_whole:
                if is_over(b"".join(pieces), most):
                    raise HTTPException(
                        413,
                        f"the body has more than {most} JSON values, {MOST_CONTAINERS} lists and objects or "
                        f"{MOST_MEMBERS} fields; send several requests, or texts",
                    )
                pieces.clear()
            return message

        await self.app(scope, counted_receive, send)
