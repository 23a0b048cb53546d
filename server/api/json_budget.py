"""Limits on the number of values in a JSON body, counted before parsing.

Parsing, validating and forgetting a million of values takes a second, in which one thread keeps the event loop.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_TOKENS = 300_000
"""Values of a body that may hold texts as token ids."""

MOST_VALUES = 65_536
"""Values of any other body."""

MOST_CONTAINERS = 32_768
"""Lists and objects among them: each costs as much as many numbers, and the garbage collector's time."""

MOST_MEMBERS = 65_536
"""Fields of all objects."""

TOKEN_PATHS = frozenset({"/v1/completions", "/v1/classify", "/detokenize"})


def most_values(path: str) -> int:
    """How many values a body sent to a path may hold."""
    return MOST_TOKENS if path in TOKEN_PATHS else MOST_VALUES


def num_values(body: bytes, most: int) -> int:
    """How many values a JSON text has, or ``most + 1`` for more; never fewer than there are.

    Each value but the first follows a comma or the opening of a list or an object. Those within strings do not count,
    unless there are so many strings that they alone are too many.
    """
    if _num_openings(body) < most:
        return _num_openings(body) + 1
    # Without escapes, every second part between quotes is a string.
    rest = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if rest.count(b'"') // 2 > 2 * most:  # a value has a key at most
        return most + 1
    return min(_num_openings(b"".join(rest.split(b'"')[::2])), most) + 1


def is_over(body: bytes, most: int) -> bool:
    """Whether a JSON text has more values, lists and objects, or fields of objects than a body may have."""
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


class JsonBudgetMiddleware:
    """Refuses JSON bodies of too many values. Uploads are read in another way.

    Args:
        app: The rest of the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one body's values when it has come."""
        if scope["type"] != "http" or "json" not in Headers(scope=scope).get("content-type", "").lower():
            await self._app(scope, receive, send)
            return
        most = most_values(scope["path"])
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

        await self._app(scope, counted_receive, send)
