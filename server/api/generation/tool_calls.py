"""Text of the model to tool calls, whole or while it arrives."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from prompt_store.files.strict_json import check_depth, finite_float, refuse_constant
from server.engine.detokenizer import REPLACEMENT, overlap

OPENING, CLOSING = "<tool_call>", "</tool_call>"
"""How Hermes, Qwen and many others write a call: JSON with a name and arguments between these."""

MAX_CALL_DEPTH = 128
"""Objects and lists within each other; what is deeper than that is text."""

_LONE_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can spell, and which is no text; of pairs, Python has made one character."""

_CALL = re.compile(r'\{"name": "([a-zA-Z0-9_-]+)", "arguments": ')
"""How a call begins that was forced by a schema: the engine writes JSON in one layout only."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, which are JSON."""

    index: int
    text: str


Piece = Text | CallStart | CallArguments


class ToolCallReader(Protocol):
    """Reads one choice's text as it comes."""

    def append(self, text: str) -> list[Piece]:
        """Take more text; returns what is certain now."""
        ...

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """The end of the text; returns what was held back, and the reason as a client is told it."""
        ...


class NamedCallReader:
    """A forced call of one function: all of the text is its arguments.

    OpenAI ends such an answer with ``stop``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def append(self, text: str) -> list[Piece]:
        """Take more text."""
        if not text:
            return []
        pieces: list[Piece] = [] if self._has_begun else [CallStart(0, _new_id(), self._name)]
        self._has_begun = True
        return [*pieces, CallArguments(0, text)]

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """The end of the text."""
        return [], reason


class RequiredCallReader:
    """A forced call of any function: an object whose layout is known."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False

    def append(self, text: str) -> list[Piece]:
        """Take more text; its last character may be the object's own brace."""
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
        """The end of the text; one that was cut off early has no brace to leave out."""
        if reason == "stop" and self._has_begun:
            return [], "tool_calls"
        if not self._held:
            return [], reason
        return [CallArguments(0, self._held) if self._has_begun else Text(self._held)], reason


class HermesReader:
    """Free text in which calls may stand between ``<tool_call>`` and ``</tool_call>``.

    A block that is no call of a known function is shown as the text that it is. White space around calls is not.

    Args:
        names: The known functions.
        allows_several: Whether calls after the first are told; otherwise nothing after it is.
    """

    def __init__(self, names: Collection[str], *, allows_several: bool) -> None:
        self._names = names
        self._allows_several = allows_several
        self._held = ""
        self._num_calls = 0
        self._follows_call = False

    def append(self, text: str) -> list[Piece]:
        """Take more text; a block is told when it is complete."""
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
        safe = len(self._held[:start].rstrip())  # white space may stand before a call
        pieces += self._show(self._held[:safe])
        self._held = self._held[safe:]
        return pieces

    def finish(self, reason: str) -> tuple[list[Piece], str]:
        """The end of the text. A last block that is not closed is a call if it is complete otherwise."""
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
        """A block's call; None where it is none."""
        try:
            call = json.loads(block, parse_constant=refuse_constant, parse_float=finite_float)
            check_depth(call, MAX_CALL_DEPTH)
        except (ValueError, RecursionError):
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
