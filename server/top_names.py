"""The names that are used the most now, among any number of names, in memory of fixed size."""

from __future__ import annotations

import time
from collections.abc import Callable

HALF_LIFE_SECONDS = 600.0
"""After this time a use counts half."""

_CANDIDATES = 4
"""Names that are counted without being among the top, for each place there."""

_MARGIN = 2.0
"""How much more a name has to be used than the one whose place it takes: two equals do not take turns."""

_MOST_HALF_LIVES = 500


class TopNames:
    """Keeps the most used names, each use counting less the longer ago it was (forward decay).

    A name that is used gets a free place at once. Where there is none it is counted, and takes the place of the least
    used name when it is used twice as much as that one.

    Args:
        size: How many names.
        clock: Seconds that never go back.
        half_life: Seconds after which a use counts half.
    """

    def __init__(
        self, size: int, *, clock: Callable[[], float] = time.monotonic, half_life: float = HALF_LIFE_SECONDS
    ) -> None:
        self._size = size
        self._clock = clock
        self._half_life = half_life
        self._began = clock()
        self._top: dict[str, float] = {}
        self._candidates: dict[str, float] = {}

    def holds(self, name: str) -> bool:
        """Whether a name has a place."""
        return name in self._top

    def use(self, name: str) -> str | None:
        """Count a use.

        Returns:
            The name that lost its place to this one, if one did.
        """
        if not self._size:
            return None
        weight = self._weight()
        if name in self._top or len(self._top) < self._size:
            self._top[name] = self._top.get(name, 0.0) + weight + self._candidates.pop(name, 0.0)
            return None
        count = self._candidates.pop(name, 0.0) + weight
        least = min(self._top, key=self._top.__getitem__)
        if count >= _MARGIN * self._top[least]:
            self._remember(least, self._top.pop(least))
            self._top[name] = count
            return least
        self._remember(name, count)
        return None

    def _remember(self, name: str, count: float) -> None:
        """Go on counting a name without a place, instead of the least used one; of equals the oldest goes."""
        if len(self._candidates) >= _CANDIDATES * self._size:
            del self._candidates[min(self._candidates, key=self._candidates.__getitem__)]
        self._candidates[name] = count

    def _weight(self) -> float:
        """What a use counts now: what later ones count more is what earlier ones have decayed."""
        half_lives = (self._clock() - self._began) / self._half_life
        if half_lives > _MOST_HALF_LIVES:  # before the numbers become too large
            for counts in (self._top, self._candidates):
                for name in counts:
                    counts[name] *= 2.0**-half_lives
            self._began, half_lives = self._clock(), 0.0
        weight: float = 2.0**half_lives
        return weight
