"""A histogram with fixed bounds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf

import msgspec

LOAD_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds of the duration of one load from a tier, in seconds."""


class Histogram(msgspec.Struct):
    """Counts of values between fixed bounds.

    The bounds are constants of the caller, so that they are not sent from one process to another with every step.

    Attributes:
        counts: Per bound, the number of values up to it and above the previous bound; then those above the last.
        sum: Sum of the values.
    """

    counts: list[int]
    sum: float = 0.0

    @classmethod
    def empty(cls, bounds: Sequence[float]) -> Histogram:
        """A histogram without values."""
        return cls([0] * (len(bounds) + 1))

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    def observe(self, bounds: Sequence[float], value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value

    def cumulative(self, bounds: Sequence[float]) -> list[tuple[float, int]]:
        """Each bound with the number of values up to it; the last bound is infinity."""
        return list(zip((*bounds, inf), accumulate(self.counts), strict=True))

    def __add__(self, other: Histogram) -> Histogram:
        """Counts and sums of both."""
        counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        return Histogram(counts, self.sum + other.sum)
