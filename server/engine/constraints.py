"""What a sequence's text may have to be. Plain data: no torch, no HTTP."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import msgspec


class ConstraintKind(StrEnum):
    """What a constraint's text is."""

    CHOICE = "choice"
    REGEX = "regex"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    GRAMMAR = "grammar"


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What a sequence's text has to be.

    Attributes:
        kind: How ``text`` is read.
        text: A JSON list of strings for choice, a regular expression of Rust's ``regex``, a JSON schema, a grammar
            in llguidance's dialect of Lark, or nothing for any JSON object.
        is_lenient: Whether what cannot be enforced of a schema is left out instead of refused.
    """

    kind: ConstraintKind
    text: str = ""
    is_lenient: bool = False


class TokenMatcher(Protocol):
    """Where one sequence stands in its grammar (``structured.Matcher``).

    Attributes:
        lowlevel: What masks are computed from.
        vocabulary: The tokens that they speak of.
    """

    lowlevel: Any
    vocabulary: Any

    def advance(self, token_id: int) -> None:
        """Take the sequence's next token."""
        ...

    def charge(self, seconds: float) -> None:
        """Take processor time off what the sequence may use."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow but the end."""
        ...

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further; None while it can."""
        ...
