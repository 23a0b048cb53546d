from __future__ import annotations

from math import fsum, inf

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.histogram import Histogram

BOUNDS = (0, 1, 2.5, 10)

values = st.lists(st.floats(-5, 20, allow_nan=False) | st.sampled_from(BOUNDS))


def histogram_of(observed: list[float]) -> Histogram:
    histogram = Histogram.empty(BOUNDS)
    for value in observed:
        histogram.observe(BOUNDS, value)
    return histogram


@given(values)
def test_cumulative_counts_are_of_the_values_up_to_each_bound(observed: list[float]) -> None:
    histogram = histogram_of(observed)
    expected = [(bound, sum(value <= bound for value in observed)) for bound in (*BOUNDS, inf)]
    assert histogram.cumulative(BOUNDS) == expected
    assert histogram.count == len(observed)
    assert histogram.sum == pytest.approx(fsum(observed), abs=1e-9)


@given(values, values)
def test_a_sum_counts_the_values_of_both_and_changes_neither(one: list[float], two: list[float]) -> None:
    first, second = histogram_of(one), histogram_of(two)
    both = first + second
    assert both.counts == histogram_of(one + two).counts
    assert both.sum == pytest.approx(first.sum + second.sum)
    assert (first, second) == (histogram_of(one), histogram_of(two))


def test_other_bounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        histogram_of([1]) + Histogram.empty(BOUNDS[1:])
    with pytest.raises(ValueError, match="zip"):
        histogram_of([1]).cumulative(BOUNDS[1:])


def test_it_crosses_processes() -> None:
    histogram = histogram_of([0.5, 99])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(histogram), type=Histogram) == histogram
