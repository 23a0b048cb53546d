"""The base of all JSON bodies and their objects, and checks of their texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request

from server.api.errors import field_path
from server.errors import InvalidRequestError, MediaTypeError


class RequestBody(BaseModel):
    """A JSON object in which null means absence and unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def first_message(error: ValidationError) -> str:
    """The first fault that pydantic found, without its prefix for our own messages."""
    return error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")


_MAY_HAVE_HALVES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")
"""A surrogate as an escape or as bytes, which Python's JSON accepts; or zeros, as in UTF-16 and UTF-32."""

MAX_LOCATION_DEPTH = 8
"""Maximum depth of a reported location; deeper faults are reported at this depth."""


def may_have_halves(body: bytes) -> bool:
    """Whether ``half_pair_in`` may find something in the JSON of a body; a quick check that few bodies fail."""
    return _MAY_HAVE_HALVES.search(body) is not None


def half_pair_in(value: object) -> tuple[str | int, ...] | None:
    """Find half of a surrogate pair in parsed JSON; it is not valid text.

    Args:
        value: A JSON value of any depth.

    Returns:
        Names and indices that lead to the string, or to its object if the half is in a name; at most
        ``MAX_LOCATION_DEPTH`` levels. None if there is none.
    """
    nodes: list[tuple[tuple[str | int, ...], object]] = [((), value)]
    while nodes:
        loc, node = nodes.pop()
        if isinstance(node, str):
            if _has_half(node):
                return loc
        elif isinstance(node, dict):
            if any(map(_has_half, node)):
                return loc
            nodes += [(_below(loc, key), item) for key, item in node.items() if isinstance(item, _HOLDS_TEXT)][::-1]
        elif isinstance(node, list):
            nodes += [(_below(loc, i), item) for i, item in enumerate(node) if isinstance(item, _HOLDS_TEXT)][::-1]
    return None


_HOLDS_TEXT = (str, dict, list)


def _below(loc: tuple[str | int, ...], part: str | int) -> tuple[str | int, ...]:
    return (*loc, part) if len(loc) < MAX_LOCATION_DEPTH else loc


def _has_half(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_unicode(texts: Sequence[str]) -> None:
    """Check that texts have no half of a surrogate pair, which JSON can express but tokenizers do not accept.

    Raises:
        ValueError: If one of them has such a half.
    """
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"should be Unicode: character {error.start} is half of a surrogate pair") from error


async def require_json(request: Request) -> None:
    """A route's dependency that rejects bodies without the content type of JSON, and text that is not Unicode.

    Browsers send other content types across origins without a preflight request. Half surrogate pairs are rejected
    here so that later code can encode every text.

    Raises:
        MediaTypeError: If the content type is not JSON.
        InvalidRequestError: If a text has half of a surrogate pair; the message names the field.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON, with 'Content-Type: application/json'")
    # Neither call waits: FastAPI reads the body before it resolves dependencies.
    if may_have_halves(await request.body()):
        loc = half_pair_in(await request.json())
        if loc is not None:
            field = field_path(loc)
            where = field or "the body"
            raise InvalidRequestError(f"{where}: should be Unicode, without half of a surrogate pair", param=field)


async def require_json_or_nothing(request: Request) -> None:
    """A route's dependency that accepts no body, or one that ``require_json`` accepts.

    Raises:
        MediaTypeError: If there is a body whose content type is not JSON.
    """
    if await request.body():
        await require_json(request)
