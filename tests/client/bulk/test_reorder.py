"""The reorder buffer returns results in order, each once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.client.bulk.reorder import ReorderBuffer


@given(first=st.integers(0, 5), order=st.permutations(range(12)), takes=st.lists(st.booleans(), min_size=12))
def test_results_are_taken_in_order(first: int, order: list[int], takes: list[bool]) -> None:
    buffer = ReorderBuffer[str](first)
    given_out = []
    for index, take in zip(order, takes, strict=False):
        buffer.add(first + index, str(first + index))
        if take:
            ready = buffer.take()
            given_out += ready
            assert buffer._next == first + len(given_out)
            assert buffer.take() == []
    given_out += buffer.take()
    assert given_out == [str(first + index) for index in range(12)]
    assert buffer.take() == []


@pytest.mark.parametrize("index", [0, 2])
def test_no_index_is_accepted_twice(index: int) -> None:
    buffer = ReorderBuffer[int]()
    buffer.add(0, 0)
    buffer.take()
    buffer.add(2, 2)
    with pytest.raises(ValueError, match="was added twice"):
        buffer.add(index, index)
