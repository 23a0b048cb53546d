"""McNemar's test, compared with enumeration, and the bootstrap interval, compared with resampling."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.evaluation.significance import bootstrap, compare, mcnemar


@given(first=st.integers(0, 6), second=st.integers(0, 6))
def test_mcnemar_matches_enumeration_of_all_outcomes(first: int, second: int) -> None:
    count = first + second
    observed = abs(first - second)
    as_uneven = sum(abs(2 * sum(flips) - count) >= observed for flips in itertools.product((0, 1), repeat=count))
    assert mcnemar(first, second) == pytest.approx(as_uneven / 2**count)
    assert mcnemar(first, second) == mcnemar(second, first)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 2 * 11 / 1024),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_matches_known_values(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p)


def test_mcnemar_of_many_rows_is_finite() -> None:
    assert mcnemar(0, 5000) == 0.0
    assert 0.0 < mcnemar(4900, 5100) < 1.0
    # The normal approximation is accurate for this many rows.
    assert mcnemar(4900, 5100) == pytest.approx(math.erfc(199 / math.sqrt(10_000) / math.sqrt(2)), rel=0.01)


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_comparisons_match_plain_counting(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    found = compare(first, second)
    assert found.num_rows == len(pairs)
    assert found.difference == pytest.approx((sum(first) - sum(second)) / len(pairs))
    assert found.both_right + found.only_first == sum(first)
    assert found.both_right + found.only_second == sum(second)
    low, high = found.interval
    assert -1.0 <= low <= high <= 1.0
    assert found.interval == compare(first, second).interval
    assert found.as_json["p_value"] == mcnemar(found.only_first, found.only_second)


def test_the_interval_matches_resampled_rows() -> None:
    differences = [1] * 30 + [-1] * 12 + [0] * 158
    rng = random.Random(3)
    drawn = sorted(sum(rng.choices(differences, k=200)) / 200 for _ in range(4000))
    low, high = bootstrap(30, 12, 200, seed=0)
    assert low == pytest.approx(drawn[100], abs=0.01)
    assert high == pytest.approx(drawn[3900], abs=0.01)
    assert low < 18 / 200 < high


def test_the_interval_of_identical_outcomes_has_no_width() -> None:
    assert bootstrap(0, 0, 10, seed=0) == (0.0, 0.0)
    assert bootstrap(10, 0, 10, seed=0) == (1.0, 1.0)
