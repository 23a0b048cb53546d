"""Numbers of a JSON schema that the compiler would round: it reads 64-bit floats and writes 64-bit integers.

A rounded bound would allow values that the schema forbids, so schemas with inexact numbers are rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, TypeGuard

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_EXACT = 2**53
"""Up to here, every integer and its neighbours are exact as floats."""

_MAX_EXCLUSIVE = 10**15
"""From here up to 2**53, the compiler writes an exclusive bound with a zero after the decimal point."""

_EXACT_POWERS = 22
"""Largest power of ten that is exact as a float, so that scaling a number's digits by it rounds only once."""

_INCLUSIVE, _EXCLUSIVE = ("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")
VALUE_KEYWORDS = ("const", "enum")
"""Keywords with JSON values, even if the values look like schemas."""

_ANNOTATIONS = ("default", "examples", "example", "x-guidance")
"""Keywords with values that are neither schemas nor constraints."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_numbers(schema: dict[str, Any]) -> None:
    """Check that all numbers of a schema can be enforced exactly.

    Args:
        schema: A schema of bounded depth.

    Raises:
        ValueError: If one cannot; the keyword is named.
    """
    for node in subschemas(schema):
        for key in _INCLUSIVE:
            if not _is_exact_bound(node.get(key), is_integer=node.get("type") == "integer"):
                raise ValueError(f"should have a {key} of at most 15 digits, or one that 64-bit floats hold exactly")
        for key in _EXCLUSIVE:
            value = node.get(key)
            if _is_number(value) and not (-_MAX_EXCLUSIVE <= value <= _MAX_EXCLUSIVE and _is_read(value)):
                raise ValueError(f"should have an {key} of at most 15 digits: larger numbers are not exact as floats")
        for key in VALUE_KEYWORDS:
            if not all(map(_is_exact_value, _numbers(node.get(key)))):
                raise ValueError(
                    f"should have numbers of at most 15 digits in its {key}, or ones that 64-bit floats hold exactly"
                )
        whole = _with_parts(node)
        if _loses_its_zero(whole, "exclusiveMinimum", 1) or _loses_its_zero(whole, "exclusiveMaximum", -1):
            raise ValueError(
                "should not combine an exclusive bound of 0 with another bound less than 1 away, which cannot be "
                "enforced: give a minimum or maximum instead"
            )


def subschemas(schema: object) -> Iterator[dict[str, Any]]:
    """A schema and all schemas inside it, without JSON values and annotations."""
    nodes: list[object] = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            yield node
            for key, value in node.items():
                if key in _NAMED and isinstance(value, dict):
                    nodes += value.values()
                elif key not in VALUE_KEYWORDS and key not in _ANNOTATIONS:
                    nodes.append(value)


def _numbers(value: object) -> Iterator[int | float]:
    """All numbers in a value."""
    values = [value]
    while values:
        item = values.pop()
        if isinstance(item, dict):
            values += item.values()
        elif isinstance(item, list):
            values += item
        elif _is_number(item):
            yield item


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_exact_bound(value: Any, *, is_integer: bool) -> bool:
    if not _is_number(value):
        return True
    if not is_integer:  # the digits of a float range's bounds are written
        return _is_exact_float(value)
    # The largest integer is rounded up, and clamped again.
    return value in (_INT64_MIN, _INT64_MAX) or (_INT64_MIN < value < _INT64_MAX and _is_read(value))


def _is_exact_value(value: int | float) -> bool:
    if isinstance(value, int) and _INT64_MIN < value < _INT64_MAX:
        return _is_read(value)
    return _is_exact_float(value)


def _is_exact_float(value: int | float) -> bool:
    """Whether a number is read and written exactly; large floats are written as their shortest digits and zeros."""
    if -_EXACT < value < _EXACT:
        return _is_read(value)
    return _is_read(value) and Decimal(repr(float(value))) == Decimal(value)


def _is_read(value: int | float) -> bool:
    """Whether the compiler's parser reads exactly this float; it may round long numbers to the next one."""
    try:
        number = float(value)
    except OverflowError:
        return False
    if isinstance(value, int) and _INT64_MIN <= value <= _INT64_MAX:
        return number == value
    written = Decimal(repr(number))
    if isinstance(value, int):
        written = written.normalize()  # it is written without decimal point
    _, digits, exponent = written.as_tuple()
    significand = int("".join(map(str, digits)))
    # The zero after the decimal point of a float is one of the digits that are read.
    is_float = significand <= _EXACT or (digits[-1] == 0 and float(significand) == significand)
    return number == value and is_float and abs(int(exponent)) <= _EXACT_POWERS


def _with_parts(node: dict[str, Any]) -> dict[str, Any]:
    """A schema merged with the schemas of its ``allOf``."""
    parts = node.get("allOf", [])
    whole = dict(node)
    for part in parts if isinstance(parts, list) else []:
        whole |= part if isinstance(part, dict) else {}
    return whole


def _loses_its_zero(node: dict[str, Any], exclusive: str, sign: int) -> bool:
    """Whether llguidance would allow an excluded 0, as it does if all remaining numbers begin with 0."""
    types = node.get("type", "number")
    if "number" not in (types if isinstance(types, list) else [types]):
        return False
    names = ("maximum", "exclusiveMaximum") if sign > 0 else ("minimum", "exclusiveMinimum")
    others = [node.get(name) for name in names]
    bound = node.get(exclusive)
    return _is_number(bound) and bound == 0 and any(_is_number(other) and other * sign < 1 for other in others)
