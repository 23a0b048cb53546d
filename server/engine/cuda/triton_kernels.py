"""Attention over paged keys and values on a GPU, as Triton kernels.

Only ``triton_attention`` imports this module, and only if it serves, because Triton may be missing.

The kernels read lengths and block tables from device memory, and their grids depend on the tensors' shapes only. So a
launch recorded in a CUDA graph is correct for the tensors' contents at each replay.

``attend`` computes tiles of rows of one sequence, each row for every query head of one key/value head; a decode is a
tile of one row. With few tiles, several programs divide the keys of each ("flash decoding": Dao et al., 2023,
https://pytorch.org/blog/flash-decoding), and ``combine`` merges their shares. The softmax is computed online (Milakov
and Gimelshein, 2018, arXiv:1805.02867). Sums are float32.
"""

# No postponed annotations: Triton recognises constant arguments by the annotation objects.

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Triton compiles a kernel again for each specialisation of its arguments, in the middle of serving. So arguments with
# arbitrary alignment, and integers that vary from step to step, are not specialised.
_ANYWHERE = ["new_keys", "new_values", "query", "out", "slots", "tables", "positions"]
_STRIDES = ["key_head_stride", "key_row_stride", "value_head_stride", "value_row_stride"]
_VARYING = ["query_head_stride", "query_row_stride", "seq_stride", "block_stride", "position_stride"]


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Compile a function by Triton at its first launch, or interpret it if TRITON_INTERPRET is set."""
    decorate: Callable[[Any], Any] = triton.jit(**options)
    return decorate


@compiled(do_not_specialize=_STRIDES, do_not_specialize_on_alignment=_ANYWHERE)
def store(  # type: ignore[no-untyped-def]
    new_keys,
    new_values,
    keys,
    values,
    slots,
    key_head_stride,
    key_row_stride,
    value_head_stride,
    value_row_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Write one row's key and value, [heads, head_dim], into its slot; program (row).

    Args:
        new_keys: [heads, rows, head_dim], with last stride 1 and strides ``key_head_stride`` and ``key_row_stride``.
        new_values: [heads, rows, head_dim], with the strides ``value_head_stride`` and ``value_row_stride``.
        keys: [slots, heads, head_dim], contiguous.
        values: [slots, heads, head_dim], contiguous.
        slots: [rows] int64.
        NUM_HEADS: Key/value heads.
        HEAD_DIM: Width of a head.
        HEADS: ``NUM_HEADS`` rounded up to a power of two.
        DIMS: ``HEAD_DIM`` rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, DIMS)[None, :]
    exists = (heads < NUM_HEADS) & (dims < HEAD_DIM)
    place = slot * NUM_HEADS * HEAD_DIM + heads * HEAD_DIM + dims
    key = tl.load(new_keys + row * key_row_stride + heads * key_head_stride + dims, mask=exists, other=0.0)
    tl.store(keys + place, key, mask=exists)
    value = tl.load(new_values + row * value_row_stride + heads * value_head_stride + dims, mask=exists, other=0.0)
    tl.store(values + place, value, mask=exists)


@compiled(
    do_not_specialize=["window", "rows_per_seq", "tiles_per_seq", *_VARYING], do_not_specialize_on_alignment=_ANYWHERE
)
def attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    tables,
    positions,
    sinks,
    out,
    parts,
    maxima,
    sums,
    scale,
    softcap,
    window,
    rows_per_seq,
    tiles_per_seq,
    query_head_stride,
    query_row_stride,
    seq_stride,
    block_stride,
    position_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Attention of one tile of rows to one share of its keys, for the query heads of one key/value head.

    Program (tile, key/value head, share) of a grid (sequences * tiles_per_seq, NUM_KV_HEADS, shares).

    Args:
        query: [heads, sequences * rows_per_seq, head_dim], with last stride 1.
        keys: [slots, kv_heads, head_dim], contiguous.
        values: [slots, kv_heads, head_dim], contiguous.
        tables: [sequences, blocks] int64, with strides ``seq_stride`` and ``block_stride``.
        positions: [sequences, rows_per_seq] int64, ascending in a sequence, with strides ``position_stride`` and 1.
        sinks: [heads]; read only if HAS_SINKS.
        out: [rows, heads, head_dim], contiguous; written unless IS_SPLIT.
        parts: [rows, heads, shares, head_dim] float32, contiguous; values weighted by exp(score - maximum). This and
            the next two are written if IS_SPLIT.
        maxima: [rows, heads, shares] float32, contiguous: the largest score; -inf for none.
        sums: [rows, heads, shares] float32, contiguous: the sum of exp(score - maximum).
        scale: Factor of the scores.
        softcap: Bound of the scores (``AttentionCall.softcap``); read only if HAS_SOFTCAP.
        window: Number of keys that a query sees (``AttentionCall.window``); 0 for all.
        rows_per_seq: Rows of each sequence.
        tiles_per_seq: Tiles of each sequence.
        NUM_KV_HEADS: Key/value heads.
        GROUP_SIZE: Query heads per key/value head.
        HEAD_DIM: Width of a head.
        DIMS: ``HEAD_DIM`` rounded up to a power of two of at least 16.
        BLOCK_SIZE: Positions in a block.
        TILE_ROWS: Rows of a tile.
        LANES: ``TILE_ROWS * GROUP_SIZE`` rounded up to a power of two of at least 16.
        TILE_KEYS: Keys per iteration, a power of two of at least 16.
        IS_SPLIT: Whether there is more than one share.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    num_shares = tl.num_programs(2)
    seq = (tile // tiles_per_seq).to(tl.int64)
    lanes = tl.arange(0, LANES)
    dims = tl.arange(0, DIMS)
    row = (tile % tiles_per_seq) * TILE_ROWS + lanes // GROUP_SIZE
    head = kv_head * GROUP_SIZE + lanes % GROUP_SIZE
    is_row = (lanes < TILE_ROWS * GROUP_SIZE) & (row < rows_per_seq)
    flat_row = seq * rows_per_seq + row
    position = tl.load(positions + seq * position_stride + row, mask=is_row, other=-1).to(tl.int32)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = query + flat_row[:, None] * query_row_stride + head[:, None] * query_head_stride + dims[None, :]
    q = tl.load(places, mask=is_element, other=0.0)

    # Positions ascend in a sequence: the first row sees the first key of the tile, the last row the last key.
    last = tl.max(position, axis=0)
    first = tl.min(tl.where(is_row, position, last), axis=0)
    start = tl.where(window > 0, tl.maximum(first - window + 1, 0), 0)
    keys_of_share = tl.cdiv(tl.cdiv(last + 1 - start, TILE_KEYS), num_shares) * TILE_KEYS
    start += share * keys_of_share
    stop = tl.minimum(start + keys_of_share, last + 1)

    maximum = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    if HAS_SINKS:
        # One share adds the sinks to the denominator; they have no value.
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32)
        maximum = tl.where(share == 0, sink, maximum)
        total = tl.where(share == 0, 1.0, total)
    acc = tl.zeros([LANES, DIMS], tl.float32)
    for tile_start in range(start, stop, TILE_KEYS):
        key_position = tile_start + tl.arange(0, TILE_KEYS)
        is_key = key_position < stop
        block = tl.load(
            tables + seq * seq_stride + (key_position // BLOCK_SIZE) * block_stride, mask=is_key, other=0
        ).to(tl.int64)
        slot = block * BLOCK_SIZE + key_position % BLOCK_SIZE
        offsets = (slot * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        is_loaded = is_key[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + offsets, mask=is_loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1) is 1 long before exp overflows; NaN stays NaN.
            twice = scores * (2.0 / softcap)
            scores = softcap * (1.0 - 2.0 / (tl.exp(tl.where(twice > 80.0, 80.0, twice)) + 1.0))
        is_seen = is_key[None, :] & (key_position[None, :] <= position[:, None])
        is_seen = is_seen & ((window == 0) | (key_position[None, :] > position[:, None] - window))
        scores = tl.where(is_seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # For a row that has seen no key yet, -inf - -inf would be NaN.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp(scores - pivot[:, None])
        kept = tl.exp(maximum - pivot)
        total = total * kept + tl.sum(weights, axis=1)
        v = tl.load(values + offsets, mask=is_loaded, other=0.0)
        acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    flat_head = flat_row * (NUM_KV_HEADS * GROUP_SIZE) + head
    if IS_SPLIT:
        part = flat_head * num_shares + share
        tl.store(maxima + part, maximum, mask=is_row)
        tl.store(sums + part, total, mask=is_row)
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_element)
    else:
        attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # lanes without a row have a total of 0
        tl.store(
            out + flat_head[:, None] * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=is_element
        )


@compiled(do_not_specialize=["num_shares"], do_not_specialize_on_alignment=_ANYWHERE)
def combine(  # type: ignore[no-untyped-def]
    parts,
    maxima,
    sums,
    out,
    num_shares,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    MAX_SHARES: tl.constexpr,
):
    """Merge the shares of one row and head, as written by ``attend``; program (row * heads + head).

    Arguments that are not listed are those of ``attend``.

    Args:
        num_shares: Number of shares.
        MAX_SHARES: A power of two, at least ``num_shares``.
    """
    flat_head = tl.program_id(0).to(tl.int64)
    shares = tl.arange(0, MAX_SHARES)
    dims = tl.arange(0, DIMS)
    place = flat_head * num_shares + shares
    exists = shares < num_shares
    maximum = tl.load(maxima + place, mask=exists, other=float("-inf"))
    total = tl.load(sums + place, mask=exists, other=0.0)
    highest = tl.max(maximum, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(maximum - highest)
    is_element = exists[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=is_element, other=0.0)
    attended = tl.sum(part * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(out + flat_head * HEAD_DIM + dims, attended.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
