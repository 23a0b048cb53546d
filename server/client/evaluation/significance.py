"""Whether a difference on the same rows may be chance: McNemar's exact test, and an interval for its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same rows.

    Attributes:
        both_right: Rows that both answer right.
        only_first: Rows that only the first answers right.
        only_second: Rows that only the second answers right.
        both_wrong: Rows that neither does.
        p_value: Two-sided, of McNemar's exact test: the chance of a split of the rows that differ at least as uneven
            as this one, if either were as likely to be right on each of them. 1 where there are none.
        interval: Where the difference of the accuracies, first less second, lies with 95 %: the percentiles of a
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
        """Rows in all."""
        return self.both_right + self.only_first + self.only_second + self.both_wrong

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.only_first - self.only_second) / self.num_rows

    @property
    def as_json(self) -> dict[str, Any]:
        """For programs."""
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
    """Compare which rows were answered right.

    Args:
        first: Of each row, at least one, whether the first evaluated answered it right.
        second: The same of the second.
        seed: Of the bootstrap.
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
    for successes in range(least):  # C(n, k + 1) from C(n, k): all of them anew would take long for many rows
        ways = ways * (count - successes) // (successes + 1)
        tail += ways
    # Whole numbers until here, so that no power of two is too small for a float.
    return float(min(1.0, 2 * tail / 2**count))


def bootstrap(only_first: int, only_second: int, count: int, *, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the difference of two accuracies on the same rows.

    A resample of rows counts only by how many of each kind are in it, so the kinds' numbers are drawn at once.
    """
    # Not at the top: the command line has to be there before numpy is.
    import numpy as np  # noqa: PLC0415

    shares = [only_first / count, only_second / count, (count - only_first - only_second) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=NUM_RESAMPLES)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / count, [tail, 100 - tail])
    return float(low), float(high)
