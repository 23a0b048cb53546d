"""Significance of a difference on the same rows: McNemar's exact test, and a bootstrap confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of two models on the same rows.

    Attributes:
        both_right: Rows that both answer correctly.
        only_first: Rows that only the first answers correctly.
        only_second: Rows that only the second answers correctly.
        both_wrong: Rows that neither answers correctly.
        p_value: Two-sided p-value of McNemar's exact test; 1 if no row differs.
        interval: 95% confidence interval of the difference of the accuracies, first minus second: percentiles of a
            bootstrap over rows.
    """

    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    p_value: float
    interval: tuple[float, float]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.both_right + self.only_first + self.only_second + self.both_wrong

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.num_rows

    @property
    def as_json(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "rows": self.num_rows,
            "both_right": self.both_right,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "both_wrong": self.both_wrong,
            "difference": self.difference,
            "p_value": self.p_value,
            "interval": list(self.interval),
            "confidence": CONFIDENCE,
        }


def compare(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> Comparison:
    """Compare the answers of two models.

    Args:
        first: For each row (at least one), whether the first model's answer is correct.
        second: The same for the second model.
        seed: Seed of the bootstrap.
    """
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return Comparison(
        both_right=pairs.count((True, True)),
        only_first=only_first,
        only_second=only_second,
        both_wrong=pairs.count((False, False)),
        p_value=mcnemar(only_first, only_second),
        interval=bootstrap(only_first, only_second, len(pairs), seed=seed),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test (1947): a binomial test of one half on the rows that differ."""
    count, least = only_first + only_second, min(only_first, only_second)
    tail = ways = 1
    for successes in range(least):  # C(n, k + 1) from C(n, k), which is fast for many rows
        ways = ways * (count - successes) // (successes + 1)
        tail += ways
    # Integers until here, because 2**-count may be too small for a float.
    return float(min(1.0, 2 * tail / 2**count))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of right answers (Wilson 1927), also near 0 and 1.

    Args:
        right: Number of right answers.
        count: Number of answers, at least one.
    """
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    width = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, (middle - width) / (1 + spread)), min(1.0, (middle + width) / (1 + spread))


def bootstrap(only_first: int, only_second: int, count: int, *, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the difference of two accuracies on the same rows.

    Only the number of rows of each kind matters in a resample, so these numbers are drawn directly.
    """
    # Imported here because numpy is slow to import and other commands do not need it.
    import numpy as np  # noqa: PLC0415

    shares = [only_first / count, only_second / count, (count - only_first - only_second) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=NUM_RESAMPLES)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / count, [tail, 100 - tail])
    return float(low), float(high)
