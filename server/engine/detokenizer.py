"""Incremental detokenization with stop strings. Runs in the API process, not in the step loop.

The text of new tokens is what they add to the text of all tokens, including the prompt's. Decoders treat the first
token of a text differently, and the first new token is not the first of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from server.engine.stop_strings import StopStrings

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not a character, or not a complete one."""

Decode = Callable[[list[int]], str]
"""Token ids to text."""

_MAX_UNDECIDED = 3
"""A character has at most four bytes, so an incomplete one has at most three."""

_CONTEXT_TOKENS = 8
"""Context for the decoder: the other bytes of a token's character, and whether anything precedes the token."""

_MAX_WINDOW_TOKENS = 24
"""The window is trimmed to its context at this length, so that the cost per token is constant."""


class TextWindow:
    """The last tokens of a sequence and their text; the end of the text may still change.

    Args:
        decode: Token ids to text; called with windows of a few tokens. Appending tokens must only extend the text,
            except for replacement characters at its end.
        prompt_ids: The tokens before the new ones.
        repeats_prompt: Whether a character that starts in the prompt and is incomplete there belongs to the new text,
            because the prompt's text is shown without it (``decided_length``).

    Attributes:
        num_chars: Characters of the new text that are final.
        pending: The text after them: replacement characters that more tokens may complete.
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
        """Whether no token so far has any text, so that the next one starts the text."""
        return not self._ids

    def append(self, token_id: int) -> str:
        """Append a new token; returns the text that is now final."""
        text = self._decode([*self._ids, token_id])
        if text == self._text and self.is_void(token_id):
            return ""
        self._ids.append(token_id)
        self._text = text
        return self._take(decided_length(text))

    def finish(self) -> str:
        """End the text; returns the rest of it."""
        return self._take(len(self._text))

    def is_void(self, token_id: int) -> bool:
        """Whether a token never has any text, for example a skipped special token.

        The window leaves out such tokens, because a token after one of them would count as the first of a text.
        """
        known = self._is_void.get(token_id)
        if known is None:
            # Twice, because decoders strip a leading space, and some tokens are only a space.
            known = self._is_void[token_id] = not self._decode([token_id, token_id])
        return known

    def _take(self, stop: int) -> str:
        """The new text before index ``stop`` of the window's text; the rest is pending."""
        if self._border is not None:
            start = common_length(self._border, self._text[:stop])
            if start == stop:  # the final text is still only the prompt's
                self.pending = self._text[len(self._border) :]
                return ""
            # New tokens may have changed the prompt's last character; it then belongs to the new text.
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
    """Decodes one sequence's new tokens and finds stop strings.

    Text that may be the start of a stop string is held back until it cannot be. Stop strings are not found in the
    prompt, nor across its end.

    Args:
        decode: Token ids to text; called with windows of a few tokens.
        stop: Strings that end the text.
        include_stop_str: Whether the text keeps the stop string that ended it.
        prompt_ids: The tokens that the new ones continue.
        repeats_prompt: See ``TextWindow``.
        hidden: The text of each token that ``decode`` skips, such as special tokens. Stop strings that contain such a
            text are found too.
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
        """The stop string that ended the text, or None."""
        return self._stops.found

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    def append(self, token_ids: list[int]) -> str:
        """Append new tokens; returns the text that is now safe to show. It is empty once stopped."""
        pieces: list[str] = []
        for token_id in token_ids:
            if self.stopped:
                break
            if token_id in self._hidden:
                pieces.append(self._append_hidden(token_id))
            elif piece := self._window.append(token_id):
                pieces.append(self._stops.append(piece))
        return "".join(pieces)

    def finish(self) -> str:
        """End the text; returns what was held back."""
        if self.stopped:
            return ""
        return self._stops.append(self._window.finish()) + self._stops.finish()

    def _append_hidden(self, token_id: int) -> str:
        """Append a token that is not shown; returns the text before it if it completes a stop string."""
        text, pending = self._hidden[token_id], self._window.pending
        # Incomplete bytes may still become a character after this token, unless the token ends the text.
        if pending and self._stops.would_end(pending, text):
            released = self._stops.append(pending)
            return released if self.stopped else released + self._stops.append(text, is_hidden=True)
        return self._stops.append(text, is_hidden=True)


def decided_length(text: str) -> int:
    """Number of characters of a decoded text that further tokens cannot change."""
    end = len(text.rstrip(REPLACEMENT)) if text.endswith(REPLACEMENT) else len(text)
    return max(end, len(text) - _MAX_UNDECIDED)


def common_length(text: str, other: str) -> int:
    """Length of the longest common prefix of two texts."""
    for index, (own, others) in enumerate(zip(text, other, strict=False)):
        if own != others:
            return index
    return min(len(text), len(other))


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
