"""What the author of an adapter probably meant by the name of a module that the base does not have."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

_MAX_CHARS = 200
"""Characters of a name in a file that are compared, or repeated in a message."""


class KnownNames:
    """The names of a base's modules, and guesses at them.

    Args:
        names: All names.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._by_template: Mapping[str, list[str]] = {}

    def hint(self, name: str) -> str:
        """A clause about the nearest names, to stand after a message; empty if nothing is near.

        Args:
            name: A name that the base does not have.
        """
        if not self._by_template:
            self._by_template = _group(self._names)
        parts = name.split(".")
        for index in range(1, len(parts)):
            tail = ".".join(parts[index:])
            if tail in self._names:
                prefix = ".".join(parts[:index])[:_MAX_CHARS] + "."
                return f"; without the prefix {prefix!a} it would be {tail!a}"
        longer = [known for known in self._names if known.endswith(f".{name}")]
        if longer:
            known = min(longer)
            return f"; with the prefix {known.removesuffix(name)!a} it would be {known!a}"
        template = _NUMBER.sub("#", name)
        same = self._by_template.get(template)
        if same is not None:
            return f"; it has {len(same)} modules like it, such as {same[-1]!a}"
        near = difflib.get_close_matches(template[:_MAX_CHARS], self._by_template, n=1, cutoff=0.5)
        if not near:
            return ""
        candidates = self._by_template[near[0]]
        numbers = _NUMBER.findall(name)
        nearest = next((one for one in candidates if _NUMBER.findall(one) == numbers), candidates[0])
        return f"; the nearest is {nearest!a}"


def _group(names: Collection[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        groups.setdefault(_NUMBER.sub("#", name), []).append(name)
    return groups
