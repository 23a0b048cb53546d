"""Parsers of tool calls in generated text, complete or streamed."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from prompt_store.files.strict_json import parse_json
from server.engine.detokenizer import REPLACEMENT, overlap

OPENING, CLOSING = "<tool_call>", "</tool_call>"
"""Tags around a call in the format of Hermes, Qwen and many others: JSON with a name and arguments."""

MAX_CALL_DEPTH = 128
"""Maximum nesting of objects and lists; a deeper block is text."""

_LONE_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can express but is not valid text."""

_CALL = re.compile(r'\{"name": "([a-zA-Z0-9_-]+)", "arguments": ')
"""The beginning of a call forced by a schema: the engine writes JSON in only one layout."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text outside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The start of a call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the arguments of a call, in JSON."""

    index: int
    text: str


Piece = Text | CallStart | CallArguments


class ToolCallReader(Protocol):
    """Reads the text of one choice as it arrives."""

    def append(self, text: str) -> list[Piece]:
        """Add text; returns the pieces that are certain now."""
        ...

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """End the text; returns the remaining pieces, and the finish reason for the client."""
        ...


class NamedCallReader:
    """A forced call of one function: all of the text is its arguments.

    OpenAI ends such an answer with ``stop``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def append(self, text: str) -> list[Piece]:
        """Add text."""
        if not text:
            return []
        pieces: list[Piece] = [] if self._has_begun else [CallStart(0, _new_id(), self._name)]
        self._has_begun = True
        return [*pieces, CallArguments(0, text)]

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """End the text."""
        return [], reason


class RequiredCallReader:
    """A forced call of any function: an object with a known layout."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False

    def append(self, text: str) -> list[Piece]:
        """Add text; its last character may be the closing brace of the object."""
        self._held += text
        pieces: list[Piece] = []
        if not self._has_begun:
            match = _CALL.match(self._held)
            if match is None:
                return []
            self._has_begun = True
            self._held = self._held[match.end() :]
            pieces.append(CallStart(0, _new_id(), match[1]))
        if len(self._held) > 1:
            pieces.append(CallArguments(0, self._held[:-1]))
            self._held = self._held[-1]
        return pieces

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """End the text; a truncated text has no closing brace to leave out."""
        if reason == "stop" and self._has_begun:
            return [], "tool_calls"
        if not self._held:
            return [], reason
        return [CallArguments(0, self._held) if self._has_begun else Text(self._held)], reason


class HermesReader:
    """Free text with calls between ``<tool_call>`` and ``</tool_call>``.

    A block that is not a call of a known function is kept as text. White space around calls is removed.

    Args:
        names: The known functions.
        allows_several: Whether calls after the first are returned.
    """

    def __init__(self, names: Collection[str], *, allows_several: bool) -> None:
        self._names = names
        self._allows_several = allows_several
        self._held = ""
        self._num_calls = 0
        self._follows_call = False

    def append(self, text: str) -> list[Piece]:
        """Add text; a block is returned when it is complete."""
        self._held += text
        pieces: list[Piece] = []
        while (start := self._held.find(OPENING)) >= 0:
            stop = self._held.find(CLOSING, start)
            if stop < 0:
                break
            end = stop + len(CLOSING)
            pieces += self._resolve(
                self._held[:start], self._held[start:end], self._held[start + len(OPENING) : stop]
            )
            self._held = self._held[end:]
        if start < 0:
            start = len(self._held) - overlap(self._held, OPENING)
        safe = len(self._held[:start].rstrip())  # white space may precede a call
        pieces += self._show(self._held[:safe])
        self._held = self._held[safe:]
        return pieces

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """End the text. A last block without closing tag is a call if it is otherwise complete."""
        pieces: list[Piece] = []
        start = self._held.find(OPENING)
        if start >= 0 and reason == "stop":
            pieces = self._resolve(self._held[:start], self._held[start:], self._held[start + len(OPENING) :])
        else:
            pieces = self._show(self._held)
        self._held = ""
        return pieces, "tool_calls" if self._num_calls and reason == "stop" else reason

    def _resolve(self, before: str, block: str, body: str) -> list[Piece]:
        call = self._read(body)
        if call is None:
            return self._show(before + block)
        pieces = self._show(before.rstrip())
        self._follows_call = True
        return pieces + call

    def _show(self, text: str) -> list[Piece]:
        if self._follows_call:
            text = text.lstrip()
        if not text:
            return []
        self._follows_call = False
        return [Text(text)]

    def _read(self, block: str) -> list[Piece] | None:
        """The call in a block; None if it is not a call."""
        try:
            call = parse_json(block, max_depth=MAX_CALL_DEPTH)
        except ValueError:
            return None
        if not isinstance(call, dict):
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        self._num_calls += 1
        if self._num_calls > 1 and not self._allows_several:
            return []
        index = self._num_calls - 1
        text = _LONE_HALF.sub(REPLACEMENT, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        return [CallStart(index, _new_id(), name), CallArguments(index, text)]


MakeReader = Callable[[], ToolCallReader]


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
