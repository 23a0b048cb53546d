"""Points in time and durations on the command line."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

import typer

_DURATION = re.compile(r"(\d{1,9})\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_duration(text: str) -> int:
    """Parse a duration such as ``90d`` to seconds.

    Raises:
        typer.BadParameter: If the text has another form, or is zero.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if seconds == 0:
        raise typer.BadParameter(f"{text!r} is not a duration: give a number with s, m, h, d or w, such as 30d")
    return seconds


def parse_time(text: str) -> int:
    """Parse a point in time to Unix seconds: a duration before now (``7d``), or a date, with time if needed.

    A date without a time zone is UTC.

    Raises:
        typer.BadParameter: If the text is neither.
    """
    if _DURATION.fullmatch(text.strip().lower()):
        return max(0, int(time.time()) - parse_duration(text))
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a time: give a duration before now such as 7d, or a date such as 2026-11-30T12:00"
        ) from error
    return max(0, int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()))
