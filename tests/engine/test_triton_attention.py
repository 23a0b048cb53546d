"""Triton's kernels give what plain attention gives: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.attention import AttentionCall, make_metadata
from server.engine.kv_cache import KVCache, KVCacheSpec
from tests.engine.triton import DEVICE, triton_attention

PRECISION = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Span = tuple[list[int], int, int]


def make_cache(dtype: torch.dtype, *, block_size: int, num_blocks: int, num_kv_heads: int, head_dim: int) -> KVCache:
    cache = KVCache(KVCacheSpec(1, num_kv_heads, head_dim, block_size, dtype), num_blocks, DEVICE)
    cache.tensor.copy_(torch.randn(cache.tensor.shape))
    return cache


def make_spans(sizes: list[tuple[int, int]], block_size: int, order: torch.Generator) -> tuple[list[Span], int]:
    """Block tables for (first position, positions) of each, their blocks scattered over the cache."""
    counts = [-(-(start + count) // block_size) for start, count in sizes]
    blocks = torch.randperm(sum(counts), generator=order).split(counts)
    return [(own.tolist(), *size) for own, size in zip(blocks, sizes, strict=True)], sum(counts)


def plain_attention(query: torch.Tensor, cache: KVCache, spans: list[Span], call: AttentionCall) -> torch.Tensor:
    """All rows, [rows, heads, head_dim], in float64, one row and one head at a time."""
    block_size, out = cache.spec.block_size, []
    keys, values = (tensor.double() for tensor in cache.layer(0))
    group_size = len(query) // cache.spec.num_kv_heads
    positions = [(table, position) for table, start, count in spans for position in range(start, start + count)]
    for row, (table, last) in enumerate(positions):
        first = 0 if call.window is None else max(0, last - call.window + 1)
        slots = [table[p // block_size] * block_size + p % block_size for p in range(first, last + 1)]
        for head in range(len(query)):
            scores = keys[slots, head // group_size] @ query[head, row].double() * call.scale
            scores = scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)
            if call.sinks is not None:
                scores = torch.cat([scores, call.sinks[head : head + 1].double()])
            out.append(scores.softmax(0)[: len(slots)] @ values[slots, head // group_size])
    return torch.stack(out).view(query.shape[1], len(query), -1)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(list(PRECISION)),
    lengths=st.lists(st.integers(1, 150), max_size=3),
    chunks=st.lists(st.tuples(st.integers(0, 60), st.integers(2, 25)), max_size=1),
    block_size=st.integers(1, 17),
    num_kv_heads=st.integers(1, 2),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([1, 7, 16, 40, 64]),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 50.0),
    has_sinks=st.booleans(),
    num_shares=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_rows_are_those_of_plain_attention(
    dtype: torch.dtype,
    lengths: list[int],
    chunks: list[tuple[int, int]],
    block_size: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    num_shares: int,
    seed: int,
) -> None:
    generator = torch.manual_seed(seed)
    sizes = [(length - 1, 1) for length in lengths] + chunks or [(0, 1)]
    spans, num_blocks = make_spans(sizes, block_size, generator)
    cache = make_cache(
        dtype, block_size=block_size, num_blocks=num_blocks, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    num_heads = group_size * num_kv_heads
    query = torch.randn(num_heads, sum(count for _, count in sizes), head_dim).to(DEVICE, dtype)
    sinks = torch.randn(num_heads).to(DEVICE, dtype) if has_sinks else None
    call = AttentionCall(head_dim**-0.5, window, softcap, sinks)
    backend = triton_attention.TritonBackend(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "num_shares", lambda *_: num_shares)
        got = backend.attend(query, 0, make_metadata(spans, block_size, DEVICE), call)
    backend.close()
    assert got.dtype is dtype
    want = plain_attention(query, cache, spans, call)
    torch.testing.assert_close(got.double(), want, rtol=PRECISION[dtype], atol=PRECISION[dtype])
