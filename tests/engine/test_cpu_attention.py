"""The compiled kernel gives what plain attention gives, and where it cannot be compiled torch's takes its place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import cpu_attention
from server.engine.attention import AttentionCall, AttentionMetadata, Rows, SDPABackend, make_metadata
from server.engine.cpu_attention import CPUBackend, make_backend, share_out
from server.engine.kv_cache import KVCache, KVCacheSpec

PRECISION = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
CPU = torch.device("cpu")


def make_cache(
    dtype: torch.dtype, *, block_size: int, num_blocks: int, num_kv_heads: int = 2, head_dim: int = 16
) -> KVCache:
    cache = KVCache(KVCacheSpec(1, num_kv_heads, head_dim, block_size, dtype), num_blocks, CPU)
    cache.tensor.copy_(torch.randn(cache.tensor.shape))
    return cache


def plain_attention(
    query: torch.Tensor,
    cache: KVCache,
    table: list[int],
    length: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One row, [heads, head_dim], in float64 and one head at a time."""
    block_size = cache.spec.block_size
    slots = [table[position // block_size] * block_size + position % block_size for position in range(length)]
    slots = slots[-window:] if window else slots
    keys, values = (tensor[slots].double() for tensor in cache.layer(0))
    out = []
    for head, own in enumerate(query.double()):
        kv_head = head * keys.shape[1] // len(query)
        scores = keys[:, kv_head] @ own * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1].double()])
        out.append(scores.softmax(0)[: len(slots)] @ values[:, kv_head])
    return torch.stack(out)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(PRECISION)),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    block_size=st.integers(1, 17),
    group_size=st.integers(1, 4),
    head_dim=st.sampled_from([1, 7, 16, 40, 64]),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 50.0),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_decodes_are_those_of_plain_attention(
    dtype: torch.dtype,
    lengths: list[int],
    block_size: int,
    group_size: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tables, num_blocks = [], 0
    for length in lengths:
        count = -(-length // block_size)
        tables.append(list(range(num_blocks, num_blocks + count)))
        num_blocks += count
    cache = make_cache(dtype, block_size=block_size, num_blocks=num_blocks, head_dim=head_dim)
    num_heads = group_size * cache.spec.num_kv_heads
    query = torch.randn(num_heads, len(lengths), head_dim).to(dtype)
    sinks = torch.randn(num_heads).to(dtype) if has_sinks else None
    metadata = make_metadata(
        [(table, length - 1, 1) for table, length in zip(tables, lengths, strict=True)], block_size, CPU
    )
    backend = CPUBackend(cache)
    backend.begin(metadata)
    got = backend.attend(query, 0, metadata, AttentionCall(head_dim**-0.5, window, softcap, sinks))
    backend.close()
    assert got.dtype is dtype
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        want = plain_attention(query[:, row], cache, table, length, head_dim**-0.5, window, softcap, sinks)
        torch.testing.assert_close(got[row].double(), want, rtol=PRECISION[dtype], atol=PRECISION[dtype])


def test_decodes_and_prefills_of_one_step_are_those_of_sdpa() -> None:
    torch.manual_seed(0)
    cache = make_cache(torch.float32, block_size=4, num_blocks=12)
    metadata = make_metadata(
        [([0, 1, 2], 8, 1), ([3], 0, 1), ([4, 5], 2, 5), ([6, 7, 8, 9], 0, 13)], cache.spec.block_size, CPU
    )
    query = torch.randn(6, 20, 16)
    results = []
    for backend in (SDPABackend(cache), CPUBackend(cache)):
        backend.begin(metadata)
        results.append(backend.attend(query, 0, metadata, AttentionCall(0.25, 6)))
        backend.close()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_value_that_is_not_finite_stays_in_its_row() -> None:
    cache = make_cache(torch.float32, block_size=4, num_blocks=4)
    metadata = make_metadata([([0, 1], 7, 1), ([2, 3], 5, 1)], 4, CPU)
    query = torch.ones(2, 2, 16)
    query[1, 0, 3] = math.nan
    backend = CPUBackend(cache)
    backend.begin(metadata)
    out = backend.attend(query, 0, metadata, AttentionCall(1.0))
    backend.close()
    assert out.isnan().any(-1).tolist() == [[False, True], [False, False]]


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=80), num_threads=st.integers(1, 16))
def test_threads_share_the_keys_out_evenly(lengths: list[int], num_threads: int) -> None:
    positions = torch.tensor(lengths)[:, None] - 1
    tables = torch.zeros(len(lengths), 1250, dtype=torch.long)
    decodes = share_out(Rows(0, len(lengths), tables, positions), 4, num_threads)
    assert sorted(decodes.rows.tolist()) == list(range(len(lengths)))
    parts = np.split(decodes.rows, decodes.bounds[1:-1])
    assert len(parts) == min(num_threads, len(lengths))
    loads = [sum(lengths[row] for row in part) for part in parts]
    # The longest-first rule: no thread is ahead of another by more than its own last row.
    assert max(loads) - min(loads) <= max(lengths)
    assert decodes.lengths.tolist() == lengths


def test_the_reference_serves_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("LLVM does not know this processor")

    monkeypatch.setattr(cpu_attention, "attend_rows", fail)
    backend = make_backend(make_cache(torch.float32, block_size=4, num_blocks=2))
    assert type(backend) is SDPABackend
    assert "attention cannot be compiled" in caplog.text
    backend.close()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, CPUBackend), (torch.float16, SDPABackend)])
def test_the_backend_follows_the_dtype(dtype: torch.dtype, expected: type[SDPABackend]) -> None:
    backend = make_backend(make_cache(dtype, block_size=4, num_blocks=2))
    assert type(backend) is expected
    backend.close()


def test_metadata_without_decodes_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(torch.float32, block_size=4, num_blocks=2)
    metadata: AttentionMetadata = make_metadata([([0, 1], 0, 7)], 4, CPU)
    backend = CPUBackend(cache)
    monkeypatch.setattr(cpu_attention, "attend_rows", None)
    backend.begin(metadata)
    assert backend.attend(torch.randn(2, 7, 16), 0, metadata, AttentionCall(0.25)).shape == (7, 2, 16)
    backend.close()
