"""Small key/value caches, and plain attention over them as a reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.attention.backend import AttentionCall
from server.engine.attention.kv_cache import KVCache, KVCacheSpec

CPU = torch.device("cpu")

Span = tuple[Sequence[int], int, int]
"""Block table, first position, number of positions."""


def make_cache(
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = 4,
    num_blocks: int = 40,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    device: torch.device = CPU,
) -> KVCache:
    """A cache of one layer, filled with random numbers."""
    cache = KVCache(KVCacheSpec(1, num_kv_heads, head_dim, block_size, dtype), num_blocks, device)
    cache.tensor.copy_(torch.randn(cache.tensor.shape))
    return cache


def plain_attention(query: torch.Tensor, cache: KVCache, spans: Sequence[Span], call: AttentionCall) -> torch.Tensor:
    """Attention in float64, one row and one head at a time.

    Args:
        query: [heads, rows, head_dim], the rows of all spans in order.
        cache: Of one layer.
        spans: As for ``make_metadata``.
        call: The layer's parameters.

    Returns:
        [rows, heads, head_dim].
    """
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
