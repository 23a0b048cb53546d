"""Stricter checks of JSON than those of Python, and its values in messages."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def refuse_constant(text: str) -> NoReturn:
    """``parse_constant``: raises ValueError, because NaN and the infinities are not JSON."""
    raise ValueError(f"{text} is not JSON")


def finite_float(text: str) -> float:
    """``parse_float``: raises ValueError for numbers that a float cannot represent, such as 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:32]} is out of range")
    return value


def parse_json(text: str, *, max_depth: int | None = None) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is not valid JSON, has a number out of range, or is nested deeper than ``max_depth`` levels.
    """
    try:
        value = json.loads(text, parse_constant=refuse_constant, parse_float=finite_float)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if max_depth is not None:
        check_depth(value, max_depth)
    return value


def check_depth(value: object, most: int) -> None:
    """Raise ValueError if objects and arrays are nested deeper than ``most`` levels below the outermost."""
    level, depth = [value], 0
    while level := [
        child
        for node in level
        if isinstance(node, dict | list)
        for child in (node.values() if isinstance(node, dict) else node)
    ]:
        depth += 1
        if depth > most:
            raise ValueError(f"nested deeper than {most} levels")


def shown(value: object) -> str:
    """A JSON value in a message: short, and in ASCII."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a huge integer"  # Python refuses to print more than 4,300 digits
    if isinstance(value, dict | list):
        return f"a JSON {'object' if isinstance(value, dict) else 'array'}"
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
