"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        area: The part that was checked, such as ``memory``.
        status: How bad it is.
        text: What was found, on one line.
        advice: What to do about it; empty if nothing has to be done.
    """

    area: str
    status: Status
    text: str
    advice: str = ""


def ok(area: str, text: str) -> Finding:
    """A finding that is as it should be."""
    return Finding(area, Status.OK, text)


def warning(area: str, text: str, advice: str) -> Finding:
    """A finding that makes the server slower or less useful."""
    return Finding(area, Status.WARNING, text, advice)


def failed(area: str, text: str, advice: str) -> Finding:
    """A finding that keeps a server from starting or answering."""
    return Finding(area, Status.FAILED, text, advice)
