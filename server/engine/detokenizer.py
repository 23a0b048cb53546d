"""Tokens to text while they arrive, and the stop strings in that text. Runs beside the API, not in the step loop.

The text of new tokens is what they add to the text of all tokens, those of the prompt included: decoders treat the
first token of a text differently, and an answer does not begin a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""

Decode = Callable[[list[int]], str]
"""Token ids to text."""

_MAX_UNDECIDED = 3
"""A character has at most four bytes, so at most three of them wait for the last one."""

_CONTEXT_TOKENS = 8
"""Decoders look at a token's neighbours: at the bytes of its character, and at whether anything precedes it."""

_MAX_WINDOW_TOKENS = 24
"""The window is cut back to its context when it is this long, so that the cost of a token stays the same."""


class TextWindow:
    """The last tokens of a sequence and their text, of which the end may still change.

    Args:
        decode: Token ids to text; called with windows of a few tokens. The text of more tokens has to begin with
            that of fewer, except for the replacement characters at its end.
        prompt_ids: The tokens before the new ones.
        repeats_prompt: Whether the characters that the prompt only begins belong to the new text as well, because
            the prompt's own text is shown without them (``decided_length``).

    Attributes:
        num_chars: Characters of the new text that are final.
        pending: The text after these; replacement characters that more tokens may turn into others.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = (), *, repeats_prompt: bool = False) -> None:
        self._decode = decode
        self._is_void: dict[int, bool] = {}
        self._ids = self._last_shown(prompt_ids)
        self._text = decode(self._ids) if self._ids else ""
        self._border: str | None = self._text
        self._num_final = len(self._text)
        self.num_chars = 0
        self.pending = ""
        if repeats_prompt:
            self._border = None
            self._num_final = decided_length(self._text)
            self.pending = self._text[self._num_final :]

    @property
    def is_empty(self) -> bool:
        """Whether no token so far shows anything: the next one begins the text."""
        return not self._ids

    def append(self, token_id: int) -> str:
        """Take a new token; returns the text that is final now."""
        text = self._decode([*self._ids, token_id])
        if text == self._text and self.is_void(token_id):
            return ""
        self._ids.append(token_id)
        self._text = text
        return self._take(decided_length(text))

    def finish(self) -> str:
        """The end of the tokens; returns the rest of the text."""
        return self._take(len(self._text))

    def is_void(self, token_id: int) -> bool:
        """Whether a token shows nothing wherever it stands, like a special token that is skipped.

        Such tokens are left out of the window: with one of them as its context, the next token would begin a text.
        """
        known = self._is_void.get(token_id)
        if known is None:
            # Twice, because decoders strip the space that a text begins with, which is all that some tokens are.
            known = self._is_void[token_id] = not self._decode([token_id, token_id])
        return known

    def _take(self, stop: int) -> str:
        """The new text before index ``stop`` of the window's; what is after it is pending."""
        if self._border is not None:
            start = common_length(self._border, self._text[:stop])
            if start == stop:  # no more than the prompt's own text, as far as it is decided
                self.pending = self._text[len(self._border) :]
                return ""
            # The prompt's last character may have become another one, which is the answer's then.
            self._num_final, self._border = start, None
        piece = self._text[self._num_final : stop]
        self._num_final = max(self._num_final, stop)
        self.num_chars += len(piece)
        self.pending = self._text[self._num_final :]
        if len(self._ids) > _MAX_WINDOW_TOKENS:
            self._ids = self._ids[-_CONTEXT_TOKENS:]
            self._text = self._decode(self._ids)
            self._num_final = max(0, len(self._text) - len(self.pending))
        return piece

    def _last_shown(self, token_ids: Sequence[int]) -> list[int]:
        last: list[int] = []
        for token_id in reversed(token_ids):
            if not self.is_void(token_id):
                last.append(token_id)
                if len(last) == _CONTEXT_TOKENS:
                    break
        return last[::-1]


class IncrementalDetokenizer:
    """Decodes one sequence's new tokens and looks for stop strings.

    Text that may be the beginning of a stop string is held back until it is known not to be. Stop strings are not
    looked for in the prompt, nor across its end.

    Args:
        decode: Token ids to text; called with windows of a few tokens.
        stop: Strings that end the text.
        include_stop_str: Whether the text keeps the stop string that ended it.
        prompt_ids: The tokens that the new ones continue.
        repeats_prompt: See ``TextWindow``.
        hidden: What each token says that ``decode`` leaves out: the special tokens, where they are skipped. Stop
            strings with one of them in it are found all the same.

    Attributes:
        text: All text emitted so far.
        stop_string: The stop string that was found, or None.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        stop: Sequence[str] = (),
        include_stop_str: bool = False,
        prompt_ids: Sequence[int] = (),
        repeats_prompt: bool = False,
        hidden: Mapping[int, str] | None = None,
    ) -> None:
        self._window = TextWindow(decode, prompt_ids, repeats_prompt=repeats_prompt)
        self._stop = tuple(stop)
        self._stop_with_hidden = _with_any(self._stop, (hidden or {}).values())
        self._hidden = (hidden or {}) if self._stop_with_hidden else {}
        self._include_stop_str = include_stop_str
        self._held: list[_Part] = []
        self.text = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    def append(self, token_ids: list[int]) -> str:
        """Take new tokens; returns the text that is safe to show now. Nothing more comes once stopped."""
        pieces: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            if token_id in self._hidden:
                pieces.append(self._say(token_id))
            elif piece := self._window.append(token_id):
                pieces.append(self._release(_Part(piece)))
        return self._emit("".join(pieces))

    def finish(self) -> str:
        """The end of the tokens; returns what was held back."""
        if self.stopped:
            return ""
        tail = self._window.finish()
        released = self._release(_Part(tail)) if tail else ""
        if not self.stopped:
            released += _shown(self._held)
            self._held = []
        return self._emit(released)

    def _say(self, token_id: int) -> str:
        """Take a token that is not shown; returns the text before it where it completes a stop string."""
        said = _Part(self._hidden[token_id], is_hidden=True)
        if self._window.pending:
            # Bytes that wait would still become a character behind this token, unless it ends the text.
            before = [*self._held, _Part(self._window.pending)]
            if self._find([*before, said]) is None:
                return self._release(said)
            self._held = before
        return self._release(said)

    def _release(self, part: _Part) -> str:
        """Add a part behind what is held; returns what can not be part of a stop string any more."""
        parts = self._held = [*self._held, part]
        found = self._find(parts)
        if found is not None:
            start, self.stop_string = found
            self._held = []
            before = _shown(_split(parts, start)[0])
            return before + self.stop_string if self._include_stop_str else before
        if not self._stop:
            self._held = []
            return _shown(parts)
        said, shown = _said(parts), _shown(parts)
        num_held = max(overlap(shown, stop) for stop in self._stop)
        num_held_said = max((overlap(said, stop) for stop in self._stop_with_hidden), default=0)
        keep_from = min(_index_of_shown(parts, len(shown) - num_held), len(said) - num_held_said)
        released, held = _split(parts, keep_from)
        self._held = _without_old_hidden(held, max(map(len, self._stop)))
        return _shown(released)

    def _find(self, parts: list[_Part]) -> tuple[int, str] | None:
        """Where the first stop string begins in what was said, and which one it is.

        The earliest end wins, so that the result does not depend on how the text was cut into tokens.
        """
        said, shown = _said(parts), _shown(parts)
        found = [
            (_index_of_shown(parts, index + len(stop) - 1) + 1, _index_of_shown(parts, index), stop)
            for stop in self._stop
            if (index := shown.find(stop)) >= 0
        ]
        found += [
            (index + len(stop), index, stop) for stop in self._stop_with_hidden if (index := said.find(stop)) >= 0
        ]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _emit(self, text: str) -> str:
        self.text += text
        return text


class _Part:
    """Text that was said in one piece, shown or hidden."""

    __slots__ = ("is_hidden", "text")

    def __init__(self, text: str, *, is_hidden: bool = False) -> None:
        self.text = text
        self.is_hidden = is_hidden


def _said(parts: list[_Part]) -> str:
    return "".join(part.text for part in parts)


def _shown(parts: list[_Part]) -> str:
    return "".join(part.text for part in parts if not part.is_hidden)


def _index_of_shown(parts: list[_Part], index: int) -> int:
    """Where the shown character ``index`` stands in what was said; the end of that for the end of the shown text."""
    said = 0
    for part in parts:
        if not part.is_hidden:
            if index < len(part.text):
                return said + index
            index -= len(part.text)
        said += len(part.text)
    return said


def _split(parts: list[_Part], index: int) -> tuple[list[_Part], list[_Part]]:
    """What was said before a character, and what from it on."""
    before: list[_Part] = []
    after: list[_Part] = []
    for part in parts:
        cut = min(max(index, 0), len(part.text))
        index -= len(part.text)
        for side, text in ((before, part.text[:cut]), (after, part.text[cut:])):
            if text:
                side.append(_Part(text, is_hidden=part.is_hidden))
    return before, after


def _without_old_hidden(parts: list[_Part], most: int) -> list[_Part]:
    """Leave out hidden parts with at least ``most`` characters behind them: no stop string reaches over them."""
    kept: list[_Part] = []
    behind = 0
    for part in reversed(parts):
        if behind < most or not part.is_hidden:
            kept.append(part)
        behind += len(part.text)
    return kept[::-1]


def _with_any(stops: Sequence[str], specials: Iterable[str]) -> tuple[str, ...]:
    said = [special for special in specials if special]
    return tuple(stop for stop in stops if any(special in stop for special in said))


def decided_length(text: str) -> int:
    """Characters of a decoded text that no more tokens can change."""
    end = len(text.rstrip(REPLACEMENT)) if text.endswith(REPLACEMENT) else len(text)
    return max(end, len(text) - _MAX_UNDECIDED)


def common_length(text: str, other: str) -> int:
    """Length of the longest beginning that two texts share."""
    for index, (own, others) in enumerate(zip(text, other, strict=False)):
        if own != others:
            return index
    return min(len(text), len(other))


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
