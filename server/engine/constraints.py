"""Constraints on a sequence's text. Plain data: no torch, no HTTP."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import msgspec


class ConstraintKind(StrEnum):
    """The kind of a constraint's text."""

    CHOICE = "choice"
    REGEX = "regex"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    GRAMMAR = "grammar"


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint on a sequence's text.

    Attributes:
        kind: How to read ``text``.
        text: By kind: a JSON list of strings, a regular expression of Rust's ``regex``, a JSON schema, or a grammar
            in llguidance's dialect of Lark. Empty for any JSON object.
        is_lenient: Whether to ignore the parts of a schema that cannot be enforced, instead of refusing the schema.
    """

    kind: ConstraintKind
    text: str = ""
    is_lenient: bool = False


class TokenMatcher(Protocol):
    """The position of one sequence in its grammar (``grammars.Matcher``).

    Attributes:
        lowlevel: llguidance's matcher, from which masks are computed.
        vocabulary: The tokens of the grammar.
    """

    lowlevel: Any
    vocabulary: Any

    def advance(self, token_id: int) -> None:
        """Consume the sequence's next token."""
        ...

    def charge(self, seconds: float) -> None:
        """Subtract processor time from the sequence's budget."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether only the end may follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why the sequence cannot follow the grammar any further; None while it can."""
        ...
