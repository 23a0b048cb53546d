"""What is checked of JSON schemas and grammars before they are compiled, in no time: sizes, depths and numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from math import lcm
from typing import Any

from prompt_store.files.strict_json import check_depth
from server.api.structured.schema_numbers import check_numbers

MAX_CONSTRAINT_CHARS = 64 * 1024
"""Of a schema as JSON, of a grammar, or of all choices together."""

MAX_SCHEMA_DEPTH = 64
"""Objects and lists within each other, those of the schema language included."""

MAX_MULTIPLE = 50_000
"""Maximum least common multiple of a schema's ``multipleOf``: the divisibility automaton has this many states."""

MAX_MULTIPLE_PLACES = 9
"""Decimal places of each."""

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
    """A schema as the engine takes it, the same for the same schema; its order is the order of the output.

    Raises:
        ValueError: If it holds a number that JSON has not.
    """
    return json.dumps(schema, separators=(",", ":"), allow_nan=False)


def _json_at(text: str, start: int) -> Any:
    """The JSON that begins at a place; None where there is none, as the compiler finds there, too.

    Python's parser takes whatever the compiler's does, and more.
    """
    while start < len(text) and text[start] in " \t\n\r":
        start += 1
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def _divisors(schema: dict[str, Any]) -> Iterator[Decimal]:
    """Every multipleOf in a schema, each positive number once."""
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
    """The least common multiple, in units of its last decimal place; of more than is allowed some larger number."""
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
