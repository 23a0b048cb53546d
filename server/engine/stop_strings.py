"""Finds stop strings in a text that arrives in pieces, at a constant cost per character."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopStrings:
    """Finds the first stop string in a text, and holds back text that may be the start of one.

    Parts of the text may be hidden. All stop strings are searched in the shown text; those that contain a hidden text
    are also searched in the whole text. The earliest end wins, then the earliest start, so the result does not depend
    on how the text was split into pieces.

    Args:
        stop: The strings.
        include: Whether the text keeps the stop string that ended it.
        hidden: The texts that may be hidden.

    Attributes:
        found: The stop string that ended the text, or None.
        look_for_hidden: Whether a stop string contains a hidden text. If not, hidden text need not be appended.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False, hidden: Iterable[str] = ()) -> None:
        texts = [text for text in hidden if text]
        self._in_shown = [_Matcher(text) for text in stop]
        self._in_whole = [_Matcher(text) for text in stop if any(part in text for part in texts)]
        self._most = max(map(len, stop), default=0)
        self._include = include
        self._held: list[_Part] = []
        self.found: str | None = None
        self.look_for_hidden = bool(self._in_whole)

    def append(self, text: str, *, is_hidden: bool = False) -> str:
        """Append text; returns the shown text that cannot be part of a stop string any more.

        Do not append after a stop string was found.
        """
        if not self._in_shown:
            return "" if is_hidden else text
        for index, char in enumerate(text):
            ended = self._advance(char, is_hidden=is_hidden)
            if ended:
                self._held.append(_Part(text[: index + 1], is_hidden=is_hidden))
                return self._end(ended)
        self._held.append(_Part(text, is_hidden=is_hidden))
        return self._release()

    def would_end(self, text: str, hidden: str) -> bool:
        """Whether shown ``text`` followed by the hidden text would complete a stop string."""
        lengths = [(matcher, matcher.length) for matcher in (*self._in_shown, *self._in_whole)]
        for char in text:
            self._advance(char, is_hidden=False)
        ends = any(self._advance(char, is_hidden=True) for char in hidden)
        for matcher, length in lengths:
            matcher.length = length
        return ends

    def finish(self) -> str:
        """End the text; returns what was held back."""
        text = _shown(self._held)
        self._held = []
        return text

    def _advance(self, char: str, *, is_hidden: bool) -> list[_Matcher]:
        """Advance the matchers by a character; returns those whose stop string ends with it."""
        reading = self._in_whole if is_hidden else [*self._in_whole, *self._in_shown]
        return [matcher for matcher in reading if matcher.advance(char)]

    def _end(self, ended: list[_Matcher]) -> str:
        parts, self._held = self._held, []
        shown, length = _shown(parts), sum(len(part.text) for part in parts)
        # A stop string may start earlier or later in the shown text than in the whole text.
        before: list[tuple[int, str]] = []
        for matcher in ended:
            stop = matcher.text
            if matcher in self._in_whole:
                before.append((len(_shown(_split(parts, length - len(stop))[0])), stop))
            else:
                before.append((len(shown) - len(stop), stop))
        start, self.found = min(before)
        return shown[:start] + self.found if self._include else shown[:start]

    def _release(self) -> str:
        shown, length = _shown(self._held), sum(len(part.text) for part in self._held)
        of_shown = max(matcher.length for matcher in self._in_shown)
        of_whole = max((matcher.length for matcher in self._in_whole), default=0)
        keep_from = min(_index_of_shown(self._held, len(shown) - of_shown), length - of_whole)
        released, held = _split(self._held, keep_from)
        self._held = _joined(held, self._most)
        return _shown(released)


class _Matcher:
    """The Knuth-Morris-Pratt automaton of one string, whose table is computed as far as the string was ever matched.

    Attributes:
        text: The string.
        length: Length of the longest prefix of the string that the text ends with.
    """

    __slots__ = ("_borders", "length", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders: list[int] = []
        """For each prefix of the string, the length of its longest border (a shorter prefix that it ends with)."""

    def advance(self, char: str) -> bool:
        """Advance by a character; returns whether the string ends with it."""
        length = self.length % len(self.text)
        while length and self.text[length] != char:
            length = self._borders[length - 1]
        self.length = length + 1 if self.text[length] == char else 0
        if self.length > len(self._borders):
            self._borders.append(self._next_border())
        return self.length == len(self.text)

    def _next_border(self) -> int:
        end = len(self._borders)
        if not end:
            return 0
        border = self._borders[-1]
        while border and self.text[end] != self.text[border]:
            border = self._borders[border - 1]
        return border + 1 if self.text[end] == self.text[border] else 0


class _Part:
    """A piece of text that is shown or hidden as a whole."""

    __slots__ = ("is_hidden", "text")

    def __init__(self, text: str, *, is_hidden: bool) -> None:
        self.text = text
        self.is_hidden = is_hidden


def _shown(parts: list[_Part]) -> str:
    return "".join([part.text for part in parts if not part.is_hidden])


def _index_of_shown(parts: list[_Part], index: int) -> int:
    """Index in the whole text of the shown character ``index``; the length of the whole text if there is none."""
    offset = 0
    for part in parts:
        if not part.is_hidden:
            if index < len(part.text):
                return offset + index
            index -= len(part.text)
        offset += len(part.text)
    return offset


def _split(parts: list[_Part], index: int) -> tuple[list[_Part], list[_Part]]:
    """Split the whole text at an index."""
    before: list[_Part] = []
    after: list[_Part] = []
    for part in parts:
        cut = min(max(index, 0), len(part.text))
        index -= len(part.text)
        for side, text in ((before, part.text[:cut]), (after, part.text[cut:])):
            if text:
                side.append(_Part(text, is_hidden=part.is_hidden))
    return before, after


def _joined(parts: list[_Part], most: int) -> list[_Part]:
    """Merge adjacent parts of one kind, and drop hidden parts followed by at least ``most`` characters.

    No stop string can reach across such a part.
    """
    kept: list[_Part] = []
    behind = 0
    for part in reversed(parts):
        behind += len(part.text)
        if part.is_hidden and behind - len(part.text) >= most:
            continue
        if kept and kept[-1].is_hidden == part.is_hidden:
            kept[-1].text = part.text + kept[-1].text
        else:
            kept.append(part)
    return kept[::-1]
