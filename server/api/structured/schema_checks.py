"""Quick checks of JSON schemas and grammars before compilation: sizes, depths and numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from math import lcm
from typing import Any

from prompt_store.files.strict_json import check_depth
from server.api.structured.schema_numbers import check_numbers

MAX_CONSTRAINT_CHARS = 64 * 1024
"""Maximum size of a schema as JSON, of a grammar, or of all choices together."""

MAX_SCHEMA_DEPTH = 64
"""Maximum nesting of objects and lists, including those of the schema language."""

MAX_MULTIPLE = 50_000
"""Maximum least common multiple of a schema's ``multipleOf``: the divisibility automaton has this many states."""

MAX_MULTIPLE_PLACES = 9
"""Maximum number of decimal places of ``multipleOf``."""

_OPTIONS, _SCHEMA = "%llguidance", "%json"
"""Keywords of grammars: options, which are rejected, and a JSON schema."""


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Bound a JSON schema.

    Raises:
        ValueError: If it is too deep or too long, divides by too large a number, or has one that is not exact.
    """
    try:
        length = len(text_of(schema))
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_SCHEMA_DEPTH} levels") from error
    if length > MAX_CONSTRAINT_CHARS:
        raise ValueError(f"should have at most {MAX_CONSTRAINT_CHARS} characters as JSON")
    check_depth(schema, MAX_SCHEMA_DEPTH)
    if _common_multiple(_divisors(schema)) > MAX_MULTIPLE:
        raise ValueError(
            f"should have multipleOf of few digits, with a least common multiple of at most {MAX_MULTIPLE}"
        )
    check_numbers(schema)
    return schema


def check_grammar(text: str) -> str:
    """Check the bounds of a grammar in llguidance's Lark syntax, and of the schemas in it.

    Raises:
        ValueError: If it sets options, or contains a schema that ``check_schema`` rejects.
    """
    if _OPTIONS in text:
        raise ValueError(f"should not contain {_OPTIONS!r}")
    start = text.find(_SCHEMA)
    while start >= 0:
        start += len(_SCHEMA)
        schema = _json_at(text, start)
        try:
            check_schema(schema if isinstance(schema, dict) else {"const": schema})
        except ValueError as error:
            raise ValueError(f"has an unsupported JSON schema: it {error}") from error
        start = text.find(_SCHEMA, start)
    return text


def text_of(schema: dict[str, Any]) -> str:
    """Format a schema for the engine. Equal schemas have equal texts; the order of keys is that of the output.

    Raises:
        ValueError: If it contains a number that JSON does not have.
    """
    return json.dumps(schema, separators=(",", ":"), allow_nan=False)


def _json_at(text: str, start: int) -> Any:
    """The JSON value that begins at an offset; None if there is none, which the compiler will report.

    Python's parser accepts everything that the compiler's parser accepts, and more.
    """
    while start < len(text) and text[start] in " \t\n\r":
        start += 1
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def _divisors(schema: dict[str, Any]) -> Iterator[Decimal]:
    """All positive values of multipleOf in a schema, each one once."""
    seen: set[Decimal] = set()
    nodes: list[Any] = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            value = node.get("multipleOf")
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                seen.add(Decimal(str(value)))
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    yield from seen


def _common_multiple(divisors: Iterator[Decimal]) -> int:
    """The least common multiple, in units of its last decimal place; any larger number if over the limit."""
    multiple = 1
    for divisor in divisors:
        if divisor > MAX_MULTIPLE or divisor != round(divisor, MAX_MULTIPLE_PLACES):
            return MAX_MULTIPLE + 1
        multiple = lcm(multiple, int(divisor.scaleb(MAX_MULTIPLE_PLACES)))
        if multiple > MAX_MULTIPLE * 10**MAX_MULTIPLE_PLACES:
            return MAX_MULTIPLE + 1
    places = MAX_MULTIPLE_PLACES
    while places and multiple % 10 == 0:
        multiple, places = multiple // 10, places - 1
    return multiple
