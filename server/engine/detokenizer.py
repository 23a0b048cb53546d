"""Tokens to text while they arrive, and the stop strings in that text. Runs beside the API, not in the step loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder writes for the first bytes of a character whose last bytes are still to come."""


class IncrementalDetokenizer:
    """Decodes one sequence's new tokens and looks for stop strings.

    Decoding a token depends on its neighbours (spaces, bytes of one character), so each step decodes a short window
    twice, with and without the new tokens, and emits the difference. Text that may be the beginning of a stop
    string is held back until it is known not to be.

    Args:
        decode: Token ids to text; called with windows of a few tokens.
        stop: Strings that end the text.
        include_stop_str: Whether the text keeps the stop string that ended it.

    Attributes:
        text: All text emitted so far.
        stop_string: The stop string that was found, or None.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], *, stop: Sequence[str] = (), include_stop_str: bool = False
    ) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._include_stop_str = include_stop_str
        self._window: list[int] = []
        """Tokens decoded together: the last that were emitted, as context, then those that wait."""
        self._num_context = 0
        self._held = ""
        self.text = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    def append(self, token_ids: list[int]) -> str:
        """Take new tokens; returns the text that is safe to show now. Nothing more comes once stopped."""
        if self.stopped:
            return ""
        pieces = []
        for token_id in token_ids:
            piece = self._advance(token_id)
            if piece:
                pieces.append(self._release(piece))
                if self.stop_string is not None:
                    break
        return self._emit("".join(pieces))

    def finish(self) -> str:
        """The end of the tokens; returns what was held back."""
        if self.stopped:
            return ""
        tail = self._decode(self._window)[len(self._decode(self._window[: self._num_context])) :]
        self._window, self._num_context = [], 0
        released = self._release(tail) if tail else ""
        if self.stop_string is None:
            released += self._held
            self._held = ""
        return self._emit(released)

    def _advance(self, token_id: int) -> str:
        self._window.append(token_id)
        before = self._decode(self._window[: self._num_context])
        after = self._decode(self._window)
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        return after[len(before) :]

    def _release(self, piece: str) -> str:
        """Add text behind what is held; returns what can not be part of a stop string any more."""
        text = self._held + piece
        found = [(index, stop) for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            # The earliest end wins, so that the result does not depend on how the text was cut into tokens.
            index, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self.stop_string = stop
            self._held = ""
            return text[: index + len(stop)] if self._include_stop_str else text[:index]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _emit(self, text: str) -> str:
        self.text += text
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
