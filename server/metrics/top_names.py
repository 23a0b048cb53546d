"""The most used names among any number of names, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable

HALF_LIFE_SECONDS = 600.0
"""Time after which a use counts half."""

_CANDIDATES = 4
"""Number of other names to count, in multiples of ``size``."""

_MARGIN = 2.0
"""Factor by which a name must be used more than the one that it replaces, so that equals do not alternate."""

_MOST_HALF_LIVES = 500


class TopNames:
    """The most used names, with uses weighted by age (forward decay).

    A name gets a free place at its first use. If no place is free, it is counted, and replaces the least used name
    once it is used twice as much.

    Args:
        size: Number of places.
        clock: A monotonic clock, in seconds.
        half_life: Time after which a use counts half, in seconds.
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
            The name that was replaced by this one, if any.
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
        """Count a name without a place; if there are too many, forget the least used one, the oldest of equals."""
        if len(self._candidates) >= _CANDIDATES * self._size:
            del self._candidates[min(self._candidates, key=self._candidates.__getitem__)]
        self._candidates[name] = count

    def _weight(self) -> float:
        """The weight of a use now. It grows with time, instead of decaying earlier counts."""
        half_lives = (self._clock() - self._began) / self._half_life
        if half_lives > _MOST_HALF_LIVES:  # rescale before the weights overflow
            for counts in (self._top, self._candidates):
                for name in counts:
                    counts[name] *= 2.0**-half_lives
            self._began, half_lives = self._clock(), 0.0
        weight: float = 2.0**half_lives
        return weight
