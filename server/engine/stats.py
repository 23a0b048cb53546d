"""Histograms with fixed bounds, counted in the step loop."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_SIZE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH_TOKENS_BOUNDS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DISTINCT_PROMPTS_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class Distribution(msgspec.Struct):
    """A histogram with fixed bounds. The bounds are constants, so that they are not sent with every step.

    Attributes:
        counts: Per bound, the number of values up to it and above the previous bound; then those above the last.
        sum: Sum of the values.
    """

    counts: list[int]
    sum: float = 0.0

    @classmethod
    def within(cls, bounds: tuple[float, ...]) -> Distribution:
        """An empty one."""
        return cls([0] * (len(bounds) + 1))

    def observe(self, bounds: tuple[float, ...], value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value

    def plus(self, other: Distribution) -> Distribution:
        """Both together."""
        counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        return Distribution(counts, self.sum + other.sum)
