"""Stop strings in a text that arrives in pieces, at a cost that does not depend on what is held back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopStrings:
    """Finds the first stop string in a text, and holds back what may be the beginning of one.

    Parts of the text may be hidden. Stop strings are looked for in what is shown, and those that have a hidden
    text in them also in all that is said. The earliest end wins, then the earliest beginning, so that the result
    does not depend on how the text was cut into pieces.

    Args:
        stop: The strings.
        include: Whether the text keeps the one that ended it.
        hidden: The texts that may be hidden.

    Attributes:
        found: The stop string that ended the text, or None.
        look_for_hidden: Whether one of them has a hidden text in it; if not, none needs to be appended.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False, hidden: Iterable[str] = ()) -> None:
        texts = [text for text in hidden if text]
        self._in_shown = [_Matcher(text) for text in stop]
        self._in_said = [_Matcher(text) for text in stop if any(part in text for part in texts)]
        self._most = max(map(len, stop), default=0)
        self._include = include
        self._held: list[_Part] = []
        self.found: str | None = None
        self.look_for_hidden = bool(self._in_said)

    def append(self, text: str, *, is_hidden: bool = False) -> str:
        """Take more text; returns what is shown and can not be part of a stop string any more.

        Nothing may be appended once a stop string is found.
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
        """Whether a hidden text would complete a stop string if another text were shown before it."""
        lengths = [(matcher, matcher.length) for matcher in (*self._in_shown, *self._in_said)]
        for char in text:
            self._advance(char, is_hidden=False)
        ends = any(self._advance(char, is_hidden=True) for char in hidden)
        for matcher, length in lengths:
            matcher.length = length
        return ends

    def finish(self) -> str:
        """The end of the text; returns what was held back."""
        text = _shown(self._held)
        self._held = []
        return text

    def _advance(self, char: str, *, is_hidden: bool) -> list[_Matcher]:
        """Let the matchers take a character; returns those whose stop string ends with it."""
        reading = self._in_said if is_hidden else [*self._in_said, *self._in_shown]
        return [matcher for matcher in reading if matcher.advance(char)]

    def _end(self, ended: list[_Matcher]) -> str:
        parts, self._held = self._held, []
        shown, length = _shown(parts), sum(len(part.text) for part in parts)
        # In what is shown a stop string may begin earlier than in what is said, or later.
        before: list[tuple[int, str]] = []
        for matcher in ended:
            stop = matcher.text
            if matcher in self._in_said:
                before.append((len(_shown(_split(parts, length - len(stop))[0])), stop))
            else:
                before.append((len(shown) - len(stop), stop))
        start, self.found = min(before)
        return shown[:start] + self.found if self._include else shown[:start]

    def _release(self) -> str:
        shown, length = _shown(self._held), sum(len(part.text) for part in self._held)
        of_shown = max(matcher.length for matcher in self._in_shown)
        of_said = max((matcher.length for matcher in self._in_said), default=0)
        keep_from = min(_index_of_shown(self._held, len(shown) - of_shown), length - of_said)
        released, held = _split(self._held, keep_from)
        self._held = _joined(held, self._most)
        return _shown(released)


class _Matcher:
    """Knuth, Morris and Pratt's automaton of one string; its table grows as far as the string was ever matched.

    Attributes:
        text: The string.
        length: Characters of it that the text ends with.
    """

    __slots__ = ("_borders", "length", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders: list[int] = []
        """Of each beginning of the string: the length of the longest shorter one that it ends with."""

    def advance(self, char: str) -> bool:
        """Take a character; returns whether the string ends with it."""
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
    """Text of which all or nothing is shown."""

    __slots__ = ("is_hidden", "text")

    def __init__(self, text: str, *, is_hidden: bool) -> None:
        self.text = text
        self.is_hidden = is_hidden


def _shown(parts: list[_Part]) -> str:
    return "".join([part.text for part in parts if not part.is_hidden])


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


def _joined(parts: list[_Part], most: int) -> list[_Part]:
    """As few parts as there are changes, without hidden ones that have ``most`` characters behind them.

    No stop string reaches over these.
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
