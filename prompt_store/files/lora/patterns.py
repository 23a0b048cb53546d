r"""Patterns of ``rank_pattern``, ``alpha_pattern`` and ``feedforward_modules``, matched in linear time.

They are text from strangers, and PEFT gives them to ``re``, which may take minutes for one name: ``(x+)+y``. Here a
pattern is compiled to steps, each of which maps the set of reached positions of a name, as the bits of an integer, to
the next set. Nothing is ever tried twice, so the time is the number of steps, whatever the name.

Served are characters, ``.``, ``[...]``, ``\d \w \s`` and their complements, escaped punctuation, ``^``, ``$``,
groups, ``|``, and ``* + ? {m,n}`` after one character or class; after a group only ``?``. They mean what they mean in
``re``. Everything else raises ``UnsafePatternError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_PATTERN_CHARS = 512
MAX_DEPTH = 16
MAX_STEPS = 512
"""Steps of one pattern, with each repetition of ``{m,n}`` counted."""

_PLAIN = re.compile(r"[A-Za-z0-9_]+(?![A-Za-z0-9_*+?{])")
_SPECIAL = frozenset("\\^$.|?*+()[{")
_QUANTIFIERS = frozenset("*+?{")

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
"""As in ``re``; a capital letter is the complement."""


class UnsafePatternError(ValueError):
    """A pattern that could take long, is not one, or uses more of ``re`` than is served; the message says which."""


class Text:
    """The name of a module, with the positions of characters and literals that patterns have asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.end = 1 << len(name)
        self.part_starts = 1 | sum(2 << index for index, char in enumerate(name) if char == ".")
        """The start, and the positions after dots."""
        self.part_lengths = frozenset(
            len(name) - start for start in range(len(name) + 1) if self.part_starts >> start & 1
        )
        """The lengths of the whole name and of its ends after dots."""
        self.num_steps = 0
        """Steps that all patterns have taken."""
        self._known: dict[str | _Chars, int] = {}

    def positions(self, what: str | _Chars) -> int:
        """The positions at which a literal or a character of a class begins, as bits."""
        mask = self._known.get(what)
        if mask is None:
            if isinstance(what, str):
                mask = sum(1 << index for index in range(len(self.name)) if self.name.startswith(what, index))
            else:
                mask = sum(1 << index for index, char in enumerate(self.name) if what.contains(char))
            self._known[what] = mask
        return mask


class Pattern:
    """A compiled pattern.

    Args:
        source: As it stands in the configuration.

    Attributes:
        source: The same.
        cost: Number of steps of one match.

    Raises:
        UnsafePatternError: If it is not served.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._steps = _Parser(source).parse()
        self._length = _length(self._steps)
        self.cost = _cost(self._steps)
        if self.cost > MAX_STEPS:
            raise UnsafePatternError(f"has {self.cost} steps; the limit is {MAX_STEPS}")

    def matches_end(self, text: Text) -> bool:
        r"""PEFT's rule for ranks and alphas: whether ``(.*\.)?(PATTERN)$`` matches the name."""
        text.num_steps += 1
        if self._length is not None and self._length not in text.part_lengths:
            return False
        return bool(_run(self._steps, text, text.part_starts) & text.end)

    def matches_whole(self, text: Text) -> bool:
        """PEFT's rule for ``feedforward_modules``: whether the pattern matches the whole name."""
        return bool(_run(self._steps, text, 1) & text.end)


@dataclass(frozen=True, slots=True, eq=False)
class _Chars:
    """A class of characters. It is compared by identity, which is fast to hash.

    The categories are those of ``re``: d, w, s, and their complements D, W, S.
    """

    chars: frozenset[str] = frozenset()
    categories: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    is_negated: bool = False

    def contains(self, char: str) -> bool:
        found = (
            char in self.chars
            or any(first <= char <= last for first, last in self.ranges)
            or any(_CATEGORIES[one.lower()](char) is one.islower() for one in self.categories)
        )
        return found is not self.is_negated


@dataclass(frozen=True, slots=True)
class _Literal:
    text: str

    def run(self, text: Text, reached: int) -> int:
        return (reached & text.positions(self.text)) << len(self.text)


@dataclass(frozen=True, slots=True)
class _Repeat:
    """``least`` to ``most`` characters of a class; without a limit if ``most`` is None."""

    chars: _Chars
    least: int = 1
    most: int | None = 1

    def run(self, text: Text, reached: int) -> int:
        allowed = text.positions(self.chars)
        for _ in range(self.least):
            reached = (reached & allowed) << 1
        if self.most is None:
            # To the end of each run of allowed characters: the carry of an addition passes along the run.
            inside = reached & allowed
            return reached | ((allowed + inside) ^ allowed)
        for _ in range(self.most - self.least):
            reached |= (reached & allowed) << 1
        return reached


@dataclass(frozen=True, slots=True)
class _Start:
    def run(self, text: Text, reached: int) -> int:
        return reached & 1


@dataclass(frozen=True, slots=True)
class _End:
    def run(self, text: Text, reached: int) -> int:
        return reached & text.end


@dataclass(frozen=True, slots=True)
class _Group:
    branches: tuple[tuple[_Step, ...], ...]
    is_optional: bool = False

    def run(self, text: Text, reached: int) -> int:
        ends = reached if self.is_optional else 0
        for branch in self.branches:
            ends |= _run(branch, text, reached)
        return ends


_Step = _Literal | _Repeat | _Start | _End | _Group

_ANY = _Chars(chars=frozenset("\n"), is_negated=True)


def _run(steps: tuple[_Step, ...], text: Text, reached: int) -> int:
    """The positions that are reached after all steps from those in ``reached``; bit i is position i."""
    num_steps = 0
    for step in steps:
        if not reached:
            break
        num_steps += 1
        reached = step.run(text, reached)
    text.num_steps += num_steps
    return reached


def _cost(steps: tuple[_Step, ...]) -> int:
    total = 0
    for step in steps:
        match step:
            case _Group(branches):
                total += 1 + sum(_cost(branch) for branch in branches)
            case _Repeat(_, least, most):
                total += max(least + 1, most or 0)
            case _:
                total += 1
    return total


def _length(steps: tuple[_Step, ...]) -> int | None:
    """The number of characters that the steps match, if it is always the same, as in the name of a module."""
    total = 0
    for step in steps:
        match step:
            case _Literal(text):
                total += len(text)
            case _Repeat(_, least, most) if least == most:
                total += least
            case _:
                return None
    return total


class _Parser:
    def __init__(self, source: str) -> None:
        if len(source) > MAX_PATTERN_CHARS:
            raise UnsafePatternError(f"has {len(source)} characters; the limit is {MAX_PATTERN_CHARS}")
        if not (source.isascii() and source.isprintable()):
            raise UnsafePatternError("has characters that are not printable ASCII")
        self._source = source
        self._at = 0

    def parse(self) -> tuple[_Step, ...]:
        branches = self._branches(depth=0)
        if self._at < len(self._source):
            raise UnsafePatternError("has a ) without a (")
        return branches[0] if len(branches) == 1 else (_Group(branches),)

    @property
    def _next(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._next
        if not char:
            raise UnsafePatternError("is incomplete")
        self._at += 1
        return char

    def _branches(self, depth: int) -> tuple[tuple[_Step, ...], ...]:
        if depth > MAX_DEPTH:
            raise UnsafePatternError(f"has groups nested deeper than {MAX_DEPTH}")
        branches = [self._branch(depth)]
        while self._next == "|":
            self._at += 1
            branches.append(self._branch(depth))
        return tuple(branches)

    def _branch(self, depth: int) -> tuple[_Step, ...]:
        steps: list[_Step] = []
        while self._next and self._next not in "|)":
            step = self._plain() or self._quantified(self._atom(depth))
            if isinstance(step, _Literal) and steps and isinstance(last := steps[-1], _Literal):
                steps[-1] = _Literal(last.text + step.text)
            else:
                steps.append(step)
        return tuple(steps)

    def _plain(self) -> _Literal | None:
        """Characters without a meaning, up to the one that a quantifier follows."""
        found = _PLAIN.match(self._source, self._at)
        if found is None:
            return None
        self._at = found.end()
        return _Literal(found[0])

    def _atom(self, depth: int) -> _Step:
        char = self._take()
        match char:
            case "^":
                return _Start()
            case "$":
                return _End()
            case ".":
                return _Repeat(_ANY)
            case "[":
                return _Repeat(self._class())
            case "(":
                return self._group(depth)
            case "\\":
                escaped = self._escaped()
                return _Literal(escaped) if isinstance(escaped, str) else _Repeat(escaped)
            case _ if char in _SPECIAL:
                raise UnsafePatternError(f"has nothing to repeat before {char}")
        return _Literal(char)

    def _group(self, depth: int) -> _Group:
        if self._next == "?":
            if not self._source.startswith("?:", self._at):
                raise UnsafePatternError("has a group (?...) other than (?:...)")
            self._at += 2
        branches = self._branches(depth + 1)
        if self._next != ")":
            raise UnsafePatternError("has a ( without a )")
        self._at += 1
        return _Group(branches)

    def _escaped(self) -> str | _Chars:
        char = self._take()
        if char in "dwsDWS":
            return _Chars(categories=frozenset(char))
        if char.isalnum():
            raise UnsafePatternError(f"has \\{char}; of letters and digits only \\d \\w \\s \\D \\W \\S are served")
        return char

    def _class(self) -> _Chars:
        is_negated = self._next == "^"
        self._at += is_negated
        chars: set[str] = set()
        categories: set[str] = set()
        ranges: list[tuple[str, str]] = []
        is_first = True
        while is_first or self._next != "]":
            one = self._class_item(is_first=is_first)
            is_first = False
            if isinstance(one, _Chars):
                categories |= one.categories
            elif self._next == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._class_item(is_first=False)
                if isinstance(last, _Chars) or last < one:
                    raise UnsafePatternError("has a range in [...] that ends before it begins, or not at a character")
                ranges.append((one, last))
            else:
                chars.add(one)
        self._at += 1
        return _Chars(frozenset(chars), frozenset(categories), tuple(ranges), is_negated)

    def _class_item(self, *, is_first: bool) -> str | _Chars:
        char = self._take()
        if char == "\\":
            return self._escaped()
        # re reserves nested classes and set operations, and warns of them.
        if char == "[" or (char == self._next and char in "&~|-"):
            raise UnsafePatternError(f"has {char} in [...], where it may mean more than itself; write \\{char}")
        if char == "-" and not is_first and self._next != "]":
            raise UnsafePatternError("has a - in [...] that is neither first nor last nor in a range")
        return char

    def _quantified(self, step: _Step) -> _Step:
        char = self._next
        if not char or char not in _QUANTIFIERS:
            return step
        self._at += 1
        least, most = self._bounds(char)
        if self._next == "?":  # as few as possible: the same set of names
            self._at += 1
        if self._next and self._next in "*+?{":
            raise UnsafePatternError(f"repeats a repetition: {char}{self._next}")
        match step:
            case _Literal(text):
                return _Repeat(_Chars(chars=frozenset(text)), least, most)
            case _Repeat(chars):
                return _Repeat(chars, least, most)
            case _Group(branches) if (least, most) == (0, 1):
                return _Group(branches, is_optional=True)
            case _Group():
                raise UnsafePatternError("repeats a group, which may take long; only ? may follow a group")
        raise UnsafePatternError("repeats ^ or $")

    def _bounds(self, char: str) -> tuple[int, int | None]:
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        close = self._source.find("}", self._at)
        least, comma, most = self._source[self._at : max(close, self._at)].partition(",")
        if not (least.isdigit() and len(least) <= 4 and (most.isdigit() or not most) and len(most) <= 4):
            raise UnsafePatternError("has a { that is not {m}, {m,} or {m,n}; write \\{ for the character")
        self._at = close + 1
        bounds = int(least), (int(most) if most else None) if comma else int(least)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise UnsafePatternError("has a {m,n} with n below m")
        return bounds
