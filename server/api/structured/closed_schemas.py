"""Close schemas that do not mention additional properties.

JSON Schema allows additional properties by default, and clients rarely set it: LangChain and Instructor send
pydantic's schemas. A small model could then add properties without end. xgrammar and OpenAI's strict schemas also
close objects.

An object is closed only if this cannot make the schema unsatisfiable, so not if several schemas apply together
(``allOf``, ``if``, a reference next to properties), because each would forbid the others' properties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TOGETHER = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "dependentSchemas")
"""Keywords that apply to the same object as their siblings."""

_LEAVES_OPEN = ("not", "if", "then", "else", "dependentSchemas")
"""Keywords whose schemas apply together with others, or are negated."""

_SPOKEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties")
"""Keywords that show that the author considered additional properties."""

_SCHEMA = ("items", "contains", "additionalProperties", "additionalItems")
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a schema without additional properties, unless the schema mentions them.

    Args:
        schema: A schema of bounded depth.
    """
    # References are not followed: if an open schema has one, everything stays open.
    if any(_open_references(schema)):
        return schema
    made: dict[str, Any] = _closed(schema)
    return made


def _closed(node: Any) -> Any:
    if not isinstance(node, dict) or _is_left_open(node):
        return node
    made = dict(node)
    for key, value in node.items():
        if key in _SCHEMA:
            made[key] = _closed(value)
        elif key in _SCHEMAS and isinstance(value, list):
            made[key] = [_closed(item) for item in value]
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            made[key] = {name: _closed(item) for name, item in value.items()}
    properties, required = node.get("properties"), node.get("required", [])
    names_all = (
        isinstance(properties, dict)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
    )
    if names_all and not any(key in node for key in _SPOKEN):
        made["additionalProperties"] = False
    return made


def _is_left_open(node: dict[str, Any]) -> bool:
    together = [key for key in _TOGETHER if key in node]
    parts = node.get("allOf", [None])
    return (
        len(together) > 1
        or ("properties" in node and bool(together))
        or any(key in node for key in _LEAVES_OPEN)
        or not (isinstance(parts, list) and len(parts) == 1)  # pydantic 1 writes a described reference as one part
    )


def _open_references(node: Any, *, is_open: bool = False) -> Iterator[bool]:
    """True for every reference from a schema that is left open; a property named ``$ref`` also counts."""
    if isinstance(node, list):
        for item in node:
            yield from _open_references(item, is_open=is_open)
    elif isinstance(node, dict):
        is_open = is_open or _is_left_open(node)
        if is_open and ("$ref" in node or "$dynamicRef" in node):
            yield True
        for value in node.values():
            yield from _open_references(value, is_open=is_open)
