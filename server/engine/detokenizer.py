"""Tokens to text while they arrive, and the stop strings in that text. Runs beside the API, not in the step loop.

The text of new tokens is what they add to the text of all tokens, those of the prompt included: decoders treat the
first token of a text differently, and an answer does not begin a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from server.engine.stop_strings import StopStrings

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
        self._stops = StopStrings(stop, include=include_stop_str, hidden=(hidden or {}).values())
        self._hidden = (hidden or {}) if self._stops.look_for_hidden else {}

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stops.found

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
                pieces.append(self._stops.append(piece))
        return "".join(pieces)

    def finish(self) -> str:
        """The end of the tokens; returns what was held back."""
        if self.stopped:
            return ""
        return self._stops.append(self._window.finish()) + self._stops.finish()

    def _say(self, token_id: int) -> str:
        """Take a token that is not shown; returns the text before it where it completes a stop string."""
        said, pending = self._hidden[token_id], self._window.pending
        # Bytes that wait may still become a character behind this token, unless it ends the text.
        if pending and self._stops.would_end(pending, said):
            released = self._stops.append(pending)
            return released if self.stopped else released + self._stops.append(said, is_hidden=True)
        return self._stops.append(said, is_hidden=True)


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
