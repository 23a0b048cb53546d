"""Names whose catalog entries have changed, for those who follow them. Bounded."""

from __future__ import annotations

from collections import deque

_MAX_CHANGES = 1024


class CatalogChanges:
    """The latest changes; each reader remembers how far it has read. Used on the event loop only.

    Attributes:
        position: Number of changes so far.
    """

    def __init__(self) -> None:
        self.position = 0
        self._latest: deque[set[str] | None] = deque(maxlen=_MAX_CHANGES)

    def note(self, names: set[str] | None) -> None:
        """Note changed names; None if they are not known."""
        self.position += 1
        self._latest.append(names)

    def since(self, position: int) -> set[str] | None:
        """The names that have changed after a position; None if they are not known."""
        count = self.position - position
        if count > len(self._latest):
            return None
        names: set[str] = set()
        for changed in [*self._latest][len(self._latest) - count :]:
            if changed is None:
                return None
            names |= changed
        return names
