"""The work of one attention launch over sequences of different lengths, planned on the host.

The rows of each sequence are cut into tiles. A tile whose keys take much longer than an average program is divided
into shares of its keys ("flash decoding": Dao et al., 2023, https://pytorch.org/blog/flash-decoding). The items of
the plan are sorted by their number of keys, so that the longest start first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.attention.backend import RowSpan
from server.engine.attention.transfers import queue_copies

MAX_SHARES = 32
"""Maximum number of programs that divide the keys of one tile; a power of two."""

ITEM_FIELDS = 8
"""Numbers of an item."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The shape of a kernel's tiles, and the options with which Triton compiles it.

    Attributes:
        lanes: Rows times query heads per key/value head in a tile; a power of two of at least 16.
        keys: Keys of an iteration; a power of two of at least 16.
        num_warps: Warps of a program.
        num_stages: Iterations in flight. With 3, keys are fetched one whole iteration ahead.
    """

    lanes: int
    keys: int
    num_warps: int
    num_stages: int = 3


# By the largest padded head and by bytes of an element. With keys fetched ahead, each needs at most 84 kB of shared
# memory (a GeForce RTX 30 or 40 has 99 KiB), and spills no register for compute capability 8.0 and 9.0. The shapes
# were chosen by these limits, not by measurements on a GPU. In float32, products are computed without tensor cores
# and need many registers; hence the smaller tiles and the 8 warps.
_PREFILLS = {
    (64, 2): Tiling(64, 32, 4),
    (64, 4): Tiling(32, 32, 4),
    (128, 2): Tiling(64, 32, 4),
    (128, 4): Tiling(32, 16, 8),
    (256, 2): Tiling(32, 32, 4),
    (256, 4): Tiling(16, 16, 8),
}
_DECODES = {
    (64, 2): Tiling(16, 64, 4),
    (64, 4): Tiling(16, 32, 8),
    (128, 2): Tiling(16, 64, 4),
    (128, 4): Tiling(16, 32, 8),
    (256, 2): Tiling(16, 32, 4),
    (256, 4): Tiling(16, 16, 8),
}
_WIDEST = Tiling(16, 16, 8, num_stages=1)


def choose_tiling(dims: int, item_bytes: int, group_size: int, *, is_decode: bool) -> Tiling:
    """The tiling for a kind of head.

    Args:
        dims: Width of a head, rounded up to a power of two of at least 16.
        item_bytes: Bytes of an element, 2 or 4.
        group_size: Query heads per key/value head; a tile has at least as many lanes.
        is_decode: Whether each tile is one row.
    """
    tiling = (_DECODES if is_decode else _PREFILLS).get((max(64, dims), item_bytes), _WIDEST)
    lanes = max(tiling.lanes, 1 << (group_size - 1).bit_length())
    return Tiling(lanes, tiling.keys, tiling.num_warps, tiling.num_stages)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one launch, on the device.

    Attributes:
        items: [items, 8] int32: first row, rows, position of the first row, start of the block table in
            ``AttentionMetadata.tables``, first key, key after the last, part (-1 if the tile is not divided), and
            1 for the first share of a tile, else 0.
        merges: [rows of divided tiles, 4] int32: row, first part of its tile, parts of its tile, first lane of the
            row in its tile.
        num_parts: Parts of all divided tiles.
    """

    items: torch.Tensor
    merges: torch.Tensor
    num_parts: int


def plan_attention(
    spans: Sequence[RowSpan],
    tiling: Tiling,
    *,
    group_size: int,
    num_kv_heads: int,
    window: int | None,
    num_programs: int,
    min_keys_of_share: int,
    device: torch.device,
) -> Plan:
    """Divide the rows and keys of a step among programs; queues one copy to the device.

    Args:
        spans: The rows of each sequence.
        tiling: The shape of the tiles.
        group_size: Query heads per key/value head.
        num_kv_heads: Programs of each item.
        window: Number of newest keys that a row sees, its own included; None for all.
        num_programs: Programs that keep the GPU busy.
        min_keys_of_share: Minimum number of keys of a program, if a tile is divided.
        device: The device of the plan.
    """
    tile_rows = tiling.lanes // group_size
    first_rows, counts, positions, tables = torch.tensor(spans).unbind(1)
    tiles = _ceil(counts, tile_rows)
    offsets = _ranks(tiles) * tile_rows
    first_rows, counts, positions, tables = (
        numbers.repeat_interleave(tiles) for numbers in (first_rows, counts, positions, tables)
    )
    first_rows, positions = first_rows + offsets, positions + offsets
    counts = (counts - offsets).clamp(max=tile_rows)
    starts = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(min=0)
    stops = positions + counts
    keys = stops - starts

    # A tile is divided if it has at least twice as many keys as a program would have if all had the same number.
    fair = max(min_keys_of_share, int(keys.sum()) * num_kv_heads // num_programs)
    keys_of_share = _ceil(_ceil(keys, (keys // fair).clamp(1, MAX_SHARES)), tiling.keys) * tiling.keys
    shares = _ceil(keys, keys_of_share)  # none is empty
    parts = torch.where(shares > 1, shares, 0)
    first_parts = parts.cumsum(0) - parts

    rank = _ranks(shares)
    fields = [first_rows, counts, positions, tables, starts, stops, first_parts, shares, keys_of_share]
    items = torch.stack(fields, 1).repeat_interleave(shares, 0)
    items[:, 4] += rank * items[:, 8]
    items[:, 5] = torch.minimum(items[:, 5], items[:, 4] + items[:, 8])
    items[:, 6] = torch.where(items[:, 7] > 1, items[:, 6] + rank, -1)
    items[:, 7] = rank == 0
    longest_first = (items[:, 5] - items[:, 4]).argsort(descending=True, stable=True)

    is_divided = shares > 1
    rows = counts[is_divided]
    rank = _ranks(rows)
    merged = torch.stack([first_rows, first_parts, shares], 1)[is_divided].repeat_interleave(rows, 0)
    merged[:, 0] += rank
    merges = torch.cat([merged, rank[:, None] * group_size], 1)
    items, merges = queue_copies([items[longest_first, :ITEM_FIELDS].int(), merges.int()], device)
    return Plan(items, merges, int(parts.sum()))


def _ceil(numbers: torch.Tensor, divisor: torch.Tensor | int) -> torch.Tensor:
    """Positive integers divided, rounded up."""
    return (numbers + divisor - 1) // divisor


def _ranks(counts: torch.Tensor) -> torch.Tensor:
    """0, 1, ... count - 1 for each count."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
