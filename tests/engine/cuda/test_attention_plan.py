"""A plan covers each row and key once, and divides what is long."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.attention.backend import RowSpan
from server.engine.cuda.attention_plan import MAX_SHARES, Plan, Tiling, choose_tiling, plan_attention
from tests.support.engine.caches import CPU

TILING = Tiling(64, 32, 4)


def make_plan(
    sizes: list[tuple[int, int]],
    tiling: Tiling = TILING,
    *,
    group_size: int = 4,
    window: int | None = None,
    num_programs: int = 528,
    min_keys_of_share: int = 256,
) -> Plan:
    """A plan for (first position, rows) of each sequence; the table of sequence i starts at 1000 i."""
    spans, row = [], 0
    for index, (start, count) in enumerate(sizes):
        spans.append(RowSpan(row, count, start, 1000 * index))
        row += count
    return plan_attention(
        spans,
        tiling,
        group_size=group_size,
        num_kv_heads=2,
        window=window,
        num_programs=num_programs,
        min_keys_of_share=min_keys_of_share,
        device=CPU,
    )


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 90)), min_size=1, max_size=8),
    group_size=st.integers(1, 16),
    lanes=st.sampled_from([16, 64]),
    keys=st.sampled_from([16, 64]),
    window=st.none() | st.integers(1, 2000),
    num_programs=st.sampled_from([1, 16, 528]),
    min_keys_of_share=st.sampled_from([1, 100, 256]),
)
def test_each_row_meets_each_key_that_it_sees_once(
    sizes: list[tuple[int, int]],
    group_size: int,
    lanes: int,
    keys: int,
    window: int | None,
    num_programs: int,
    min_keys_of_share: int,
) -> None:
    plan = make_plan(
        sizes,
        Tiling(lanes, keys, 4),
        group_size=group_size,
        window=window,
        num_programs=num_programs,
        min_keys_of_share=min_keys_of_share,
    )
    items: list[list[int]] = plan.items.tolist()
    lengths = [item[5] - item[4] for item in items]
    assert lengths == sorted(lengths, reverse=True)
    assert min(lengths) > 0
    ranges = defaultdict(list)  # of each row
    for first_row, count, position, table, start, stop, part, is_first in items:
        assert 1 <= count * group_size <= lanes
        for offset in range(count):
            ranges[first_row + offset].append((start, stop, part, position + offset, table, is_first, offset))
    merges = {row: own for row, *own in plan.merges.tolist()}
    assert len(merges) == len(plan.merges)
    parts = set()
    row = 0
    for index, (first, count) in enumerate(sizes):
        for position in range(first, first + count):
            shares = sorted(ranges.pop(row))
            assert {(own[3], own[4]) for own in shares} == {(position, 1000 * index)}
            assert all(one[1] == other[0] for one, other in pairwise(shares))
            assert shares[0][0] <= max(0, position - window + 1 if window else 0)
            assert shares[-1][1] > position
            assert [own[5] for own in shares] == [1] + [0] * (len(shares) - 1)
            own_parts = [own[2] for own in shares]
            if len(shares) == 1:
                assert own_parts == [-1]
                assert row not in merges
            else:
                assert merges.pop(row) == [own_parts[0], len(shares), shares[0][6] * group_size]
                assert own_parts == list(range(own_parts[0], own_parts[0] + len(shares)))
                assert len(shares) <= MAX_SHARES
                parts.update(own_parts)
            row += 1
    assert not ranges
    assert not merges
    assert parts == set(range(plan.num_parts))


def test_a_long_chunk_is_divided_among_short_ones() -> None:
    """Its keys would take as long as everything else; the short chunks stay whole."""
    plan = make_plan([(100_000, 16)] + [(0, 100)] * 31)
    assert len(plan.merges) == 16
    assert plan.num_parts == MAX_SHARES
    assert len(plan.items) == 31 * 7 + MAX_SHARES
    assert plan.items[: MAX_SHARES - 1, 0].eq(0).all()


def test_nothing_is_divided_if_there_are_programs_enough() -> None:
    plan = make_plan([(0, 8192)])
    assert (plan.num_parts, len(plan.merges), len(plan.items)) == (0, 0, 512)


def test_parts_are_at_most_as_many_as_programs() -> None:
    for sizes in ([(4000, 1)] * 32, [(9000, 500)], [(0, 4096), (60_000, 64), (3, 1)], [(100_000, 1)] * 3):
        assert make_plan(sizes).num_parts * 2 <= 528


@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("dims", [16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_a_tile_holds_the_query_heads_of_a_row(is_decode: bool, dims: int, item_bytes: int) -> None:
    for group_size in (1, 7, 16, 71):
        tiling = choose_tiling(dims, item_bytes, group_size, is_decode=is_decode)
        assert tiling.lanes >= max(16, group_size)
        assert all(number.bit_count() == 1 for number in (tiling.lanes, tiling.keys, tiling.num_warps))


def test_numbers_are_of_the_type_that_the_kernels_read() -> None:
    plan = make_plan([(900, 3)], num_programs=10_000)
    assert (plan.items.dtype, plan.merges.dtype) == (torch.int32, torch.int32)
    assert (plan.items.stride(), plan.merges.stride()) == ((8, 1), (4, 1))
