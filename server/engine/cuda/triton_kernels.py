"""Attention over paged keys and values on a GPU, as Triton kernels.

Only ``triton_attention`` imports this module, and only if it serves, because Triton may be missing.

The kernels read lengths and block tables from device memory, and the grids of decodes depend on the tensors' shapes
only. So a launch recorded in a CUDA graph is correct for the tensors' contents at each replay.

``attend`` computes tiles of rows of one sequence, each row for every query head of one key/value head. A step of
decodes has a tile for each row, and its grid depends on the tensors' shapes only. A step with prefill chunks has a
list of tiles (``attention_plan``). If there are few tiles, or one is very long, several programs divide the keys of a
tile ("flash decoding": Dao et al., 2023, https://pytorch.org/blog/flash-decoding), and ``combine`` merges their
shares. The softmax is computed online (Milakov and Gimelshein, 2018, arXiv:1805.02867). Sums are float32.
"""

# No postponed annotations: Triton recognises constant arguments by the annotation objects.

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Triton compiles a kernel again for each specialisation of its arguments, in the middle of serving. So arguments with
# arbitrary alignment, and integers that vary from step to step, are not specialised.
_ANYWHERE = [
    "new_keys",
    "new_values",
    "query",
    "out",
    "slots",
    "tables",
    "positions",
    "items",
    "merges",
    "maxima",
    "sums",
]
_STRIDES = ["key_head_stride", "key_row_stride", "value_head_stride", "value_row_stride"]
_VARYING = ["window", "query_head_stride", "query_row_stride", "seq_stride", "block_stride", "position_stride"]


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


@compiled(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANYWHERE)
def attend(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    tables,
    positions,
    items,
    sinks,
    out,
    parts,
    maxima,
    sums,
    scale,
    softcap,
    window,
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
    LANES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    IS_LISTED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attention of one tile of rows to one share of its keys, for the query heads of one key/value head.

    Of a list: program (item * NUM_KV_HEADS + kv_head). Of decodes, one row each: program
    (row * NUM_KV_HEADS + kv_head, share) of a grid (rows * NUM_KV_HEADS, shares).

    Args:
        query: [heads, rows, head_dim], with last stride 1.
        keys: [slots, kv_heads, head_dim], contiguous.
        values: [slots, kv_heads, head_dim], contiguous.
        tables: int64. Of a list, all block tables, with ``block_stride`` 1. Of decodes, [rows, blocks] with strides
            ``seq_stride`` and ``block_stride``.
        positions: [rows] int64, with stride ``position_stride``; read only for decodes.
        items: [items, 8] int32, as in ``attention_plan.Plan``; read only if IS_LISTED.
        sinks: [heads]; read only if HAS_SINKS.
        out: [rows, heads, head_dim], contiguous; written for tiles that are not divided.
        parts: [parts, kv_heads, LANES, head_dim] float32, contiguous; values weighted by exp(score - maximum). This
            and the next two are written for divided tiles. Part ``row * shares + share`` is that of a decode.
        maxima: [parts, kv_heads, LANES] float32, contiguous: the largest score; -inf for none.
        sums: [parts, kv_heads, LANES] float32, contiguous: the sum of exp(score - maximum).
        scale: Factor of the scores.
        softcap: Bound of the scores (``AttentionCall.softcap``); read only if HAS_SOFTCAP.
        window: Number of keys that a query sees (``AttentionCall.window``); 0 for all.
        NUM_KV_HEADS: Key/value heads.
        GROUP_SIZE: Query heads per key/value head.
        HEAD_DIM: Width of a head.
        DIMS: ``HEAD_DIM`` rounded up to a power of two of at least 16.
        BLOCK_SIZE: Positions in a block.
        LANES: Rows of a tile times GROUP_SIZE, rounded up to a power of two of at least 16.
        TILE_KEYS: Keys per iteration, a power of two of at least 16.
        IS_LISTED: Whether the work is a list.
    """
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS
    if IS_LISTED:
        item = items + tile.to(tl.int64) * 8
        first_row = tl.load(item)
        num_rows = tl.load(item + 1)
        first_position = tl.load(item + 2)
        table = tables + tl.load(item + 3)
        start = tl.load(item + 4)
        stop = tl.load(item + 5)
        part = tl.load(item + 6)
        is_first = tl.load(item + 7) != 0
    else:
        share = tl.program_id(1)
        num_shares = tl.num_programs(1)
        first_row = tile
        num_rows = 1
        first_position = tl.load(positions + tile.to(tl.int64) * position_stride).to(tl.int32)
        table = tables + tile.to(tl.int64) * seq_stride
        start = tl.where(window > 0, tl.maximum(first_position - window + 1, 0), 0)
        keys_of_share = tl.cdiv(tl.cdiv(first_position + 1 - start, TILE_KEYS), num_shares) * TILE_KEYS
        start += share * keys_of_share
        stop = tl.minimum(start + keys_of_share, first_position + 1)
        part = tl.where(num_shares > 1, tile * num_shares + share, -1)
        is_first = share == 0
    lanes = tl.arange(0, LANES)
    dims = tl.arange(0, DIMS)
    row = lanes // GROUP_SIZE
    head = kv_head * GROUP_SIZE + lanes % GROUP_SIZE
    is_row = row < num_rows
    position = first_position + row
    flat_row = (first_row + row).to(tl.int64)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    places = query + flat_row[:, None] * query_row_stride + head[:, None] * query_head_stride + dims[None, :]
    q = tl.load(places, mask=is_element, other=0.0)

    maximum = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    if HAS_SINKS:
        # One share adds the sinks to the denominator; they have no value.
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32)
        maximum = tl.where(is_first, sink, maximum)
        total = tl.where(is_first, 1.0, total)
    acc = tl.zeros([LANES, DIMS], tl.float32)
    # Blocks are looked up one iteration ahead, so that keys and values depend on no load of their own iteration.
    # Triton divides its stages (num_stages) among loads that depend on each other, and would fetch neither ahead.
    key_position = start + tl.arange(0, TILE_KEYS)
    block = tl.load(table + (key_position // BLOCK_SIZE) * block_stride, mask=key_position < stop, other=0)
    for tile_start in range(start, stop, TILE_KEYS):
        key_position = tile_start + tl.arange(0, TILE_KEYS)
        is_key = key_position < stop
        slot = block.to(tl.int64) * BLOCK_SIZE + key_position % BLOCK_SIZE
        later = key_position + TILE_KEYS
        block = tl.load(table + (later // BLOCK_SIZE) * block_stride, mask=later < stop, other=0)
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

    if part >= 0:
        place = (part.to(tl.int64) * NUM_KV_HEADS + kv_head) * LANES + lanes
        tl.store(maxima + place, maximum, mask=is_row)
        tl.store(sums + place, total, mask=is_row)
        tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_element)
    else:
        flat_head = flat_row * (NUM_KV_HEADS * GROUP_SIZE) + head
        attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # lanes without a row have a total of 0
        tl.store(
            out + flat_head[:, None] * HEAD_DIM + dims[None, :], attended.to(out.dtype.element_ty), mask=is_element
        )


@compiled(do_not_specialize=["num_shares"], do_not_specialize_on_alignment=_ANYWHERE)
def combine(  # type: ignore[no-untyped-def]
    parts,
    maxima,
    sums,
    merges,
    out,
    num_shares,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    LANES: tl.constexpr,
    IS_LISTED: tl.constexpr,
    MAX_SHARES: tl.constexpr,
):
    """Merge the shares of one row and head, as written by ``attend``; program (row * heads + head).

    Arguments that are not listed are those of ``attend``.

    Args:
        merges: [rows, 4] int32, as in ``attention_plan.Plan``; read only if IS_LISTED.
        num_shares: Number of shares of each decode; read unless IS_LISTED.
        MAX_SHARES: A power of two, at least the number of shares.
    """
    head = tl.program_id(0) % (NUM_KV_HEADS * GROUP_SIZE)
    row = tl.program_id(0) // (NUM_KV_HEADS * GROUP_SIZE)
    if IS_LISTED:
        merge = merges + row.to(tl.int64) * 4
        row = tl.load(merge)
        first_part = tl.load(merge + 1).to(tl.int64)
        count = tl.load(merge + 2)
        first_lane = tl.load(merge + 3)
    else:
        first_part = row.to(tl.int64) * num_shares
        count = num_shares
        first_lane = 0
    shares = tl.arange(0, MAX_SHARES)
    dims = tl.arange(0, DIMS)
    place = ((first_part + shares) * NUM_KV_HEADS + head // GROUP_SIZE) * LANES + first_lane + head % GROUP_SIZE
    exists = shares < count
    maximum = tl.load(maxima + place, mask=exists, other=float("-inf"))
    total = tl.load(sums + place, mask=exists, other=0.0)
    highest = tl.max(maximum, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(maximum - highest)
    is_element = exists[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=is_element, other=0.0)
    attended = tl.sum(part * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    flat_head = row.to(tl.int64) * (NUM_KV_HEADS * GROUP_SIZE) + head
    tl.store(out + flat_head * HEAD_DIM + dims, attended.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
