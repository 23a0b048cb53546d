"""Checks that a value is not None."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def present(value: Value | None) -> Value:
    """The value, after a check that it is not None."""
    assert value is not None
    return value
