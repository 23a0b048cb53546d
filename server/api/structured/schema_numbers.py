"""Numbers of a JSON schema that the compiler would round: it reads them as 64-bit floats and writes 64-bit integers.

A bound that is rounded lets values through that the schema does not take, so what is not exact is refused. No schema
is made less than it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, TypeGuard

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_EXACT = 2**53
"""Up to here, every integer is a float, and so are its neighbours."""

_MAX_EXCLUSIVE = 10**15
"""Beyond it, up to 2**53, the compiler writes the digits of an exclusive bound with a zero behind the point."""

_EXACT_POWERS = 22
"""Powers of ten that are floats, so that one product or quotient of a number's digits with them is rounded once."""

_INCLUSIVE, _EXCLUSIVE = ("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")
VALUE_KEYWORDS = ("const", "enum")
"""What these hold is JSON, however much it looks like a schema."""

_ANNOTATIONS = ("default", "examples", "example", "x-guidance")
"""What these hold is neither a schema nor a value that is demanded."""

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_numbers(schema: dict[str, Any]) -> None:
    """Look for numbers that cannot be held to exactly.

    Args:
        schema: Of bounded depth.

    Raises:
        ValueError: If it has one; the keyword is named.
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
    """A schema and all in it, wherever a keyword may have one; not what it says of values."""
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
    if not is_integer:  # of a range of floats, the bounds' digits are written
        return _is_exact_float(value)
    # The largest is rounded up, and cut off there again.
    return value in (_INT64_MIN, _INT64_MAX) or (_INT64_MIN < value < _INT64_MAX and _is_read(value))


def _is_exact_value(value: int | float) -> bool:
    if isinstance(value, int) and _INT64_MIN < value < _INT64_MAX:
        return _is_read(value)
    return _is_exact_float(value)


def _is_exact_float(value: int | float) -> bool:
    """Whether a number is read, and written: large ones as the digits that tell a float from others, and zeros."""
    if -_EXACT < value < _EXACT:
        return _is_read(value)
    return _is_read(value) and Decimal(repr(float(value))) == Decimal(value)


def _is_read(value: int | float) -> bool:
    """Whether the compiler's parser reads exactly this float: of long numbers it may take the next one."""
    try:
        number = float(value)
    except OverflowError:
        return False
    if isinstance(value, int) and _INT64_MIN <= value <= _INT64_MAX:
        return number == value
    written = Decimal(repr(number))
    if isinstance(value, int):
        written = written.normalize()  # it is written without a point, and without the zero behind one
    _, digits, exponent = written.as_tuple()
    significand = int("".join(map(str, digits)))
    # The zero behind a float's point is one of the digits that are read.
    is_float = significand <= _EXACT or (digits[-1] == 0 and float(significand) == significand)
    return number == value and is_float and abs(int(exponent)) <= _EXACT_POWERS


def _with_parts(node: dict[str, Any]) -> dict[str, Any]:
    """A schema and those that have to hold with it, as one."""
    parts = node.get("allOf", [])
    whole = dict(node)
    for part in parts if isinstance(parts, list) else []:
        whole |= part if isinstance(part, dict) else {}
    return whole


def _loses_its_zero(node: dict[str, Any], exclusive: str, sign: int) -> bool:
    """Whether llguidance would allow 0 where it is excluded, which it does when all that is left begins with 0."""
    types = node.get("type", "number")
    if "number" not in (types if isinstance(types, list) else [types]):
        return False
    names = ("maximum", "exclusiveMaximum") if sign > 0 else ("minimum", "exclusiveMinimum")
    others = [node.get(name) for name in names]
    bound = node.get(exclusive)
    return _is_number(bound) and bound == 0 and any(_is_number(other) and other * sign < 1 for other in others)
