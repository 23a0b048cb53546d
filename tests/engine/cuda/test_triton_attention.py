"""Triton's kernels equal plain attention: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from server.engine.attention.backend import AttentionCall, AttentionMetadata, SDPABackend, make_metadata
from server.engine.cuda.attention_plan import MAX_SHARES
from server.engine.model import exactness
from server.errors import EngineStartError
from tests.support.engine.caches import Span, make_cache, plain_attention
from tests.support.engine.triton import DEVICE, triton_attention

pytestmark = pytest.mark.slow

PRECISION = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""In float32 a score of 16, which occurs with heads of one element, has a rounding error of 1e-6."""


def make_spans(sizes: list[tuple[int, int]], block_size: int, order: torch.Generator) -> tuple[list[Span], int]:
    """Spans of the given (first position, positions), with blocks scattered over the cache, and the block count."""
    counts = [-(-(start + count) // block_size) for start, count in sizes]
    blocks = torch.split(torch.randperm(sum(counts), generator=order), counts)
    return [(own.tolist(), *size) for own, size in zip(blocks, sizes, strict=True)], sum(counts)


# Without the shrinking phase, which takes minutes in the interpreter.
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    dtype=st.sampled_from(list(PRECISION)),
    lengths=st.lists(st.integers(1, 150), max_size=3),
    chunks=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), max_size=4),
    block_size=st.integers(1, 17),
    num_kv_heads=st.integers(1, 2),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([1, 7, 16, 40, 64]),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 50.0),
    has_sinks=st.booleans(),
    num_shares=st.integers(1, 5),
    min_keys_of_share=st.sampled_from([1, 40, 256]),
    is_projection=st.booleans(),
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
    min_keys_of_share: int,
    is_projection: bool,
    seed: int,
) -> None:
    generator = torch.manual_seed(seed)
    sizes = [(length - 1, 1) for length in lengths] + chunks or [(0, 1)]
    spans, num_blocks = make_spans(sizes, block_size, generator)
    cache = make_cache(
        dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device=DEVICE,
    )
    num_heads = group_size * num_kv_heads
    query = torch.randn(num_heads, sum(count for _, count in sizes), head_dim).to(DEVICE, dtype)
    if is_projection:  # a row's heads are adjacent, between other numbers
        query = torch.cat([query, query.flip(0)]).transpose(0, 1).contiguous().transpose(0, 1)[:num_heads]
    sinks = torch.randn(num_heads).to(DEVICE, dtype) if has_sinks else None
    call = AttentionCall(head_dim**-0.5, window, softcap, sinks)
    backend = triton_attention.TritonBackend(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "num_shares", lambda *_: num_shares)  # for decodes alone
        patch.setattr(backend, "_min_keys_of_share", min_keys_of_share)
        patch.setattr(backend, "_num_programs", 1000)
        got = backend.attend(query, 0, make_metadata(spans, block_size, DEVICE), call)
    assert got.dtype is dtype
    want = plain_attention(query, cache, spans, call)
    torch.testing.assert_close(got.double(), want, rtol=PRECISION[dtype], atol=PRECISION[dtype])


def test_a_soft_prompt_is_shared_by_chunks_and_decodes() -> None:
    """Two prefills and a decode behind the same blocks, the last of which each has copied."""
    torch.manual_seed(0)
    cache = make_cache(num_blocks=30, num_kv_heads=2, device=DEVICE)
    virtual = [7, 21, 3]
    spans: list[Span] = [([*virtual, 4, 9], 17, 1), ([*virtual, 11, 2, 5], 13, 9), ([*virtual, 8], 13, 3)]
    query = torch.randn(6, 13, 16).to(DEVICE)
    call = AttentionCall(0.25)
    got = triton_attention.TritonBackend(cache).attend(query, 0, make_metadata(spans, 4, DEVICE), call)
    torch.testing.assert_close(got.double(), plain_attention(query, cache, spans, call), rtol=2e-5, atol=2e-5)


def test_layers_of_different_shape_share_the_metadata() -> None:
    """A plan depends on the layer's window and its query heads."""
    torch.manual_seed(0)
    cache = make_cache(num_blocks=30, num_kv_heads=1, device=DEVICE)
    backend = triton_attention.TritonBackend(cache)
    for spans in ([([0, 5, 2], 5, 4), ([3], 2, 1)], [([4, 1], 0, 7)]):
        metadata = make_metadata(spans, 4, DEVICE)
        for num_heads, window in ((1, None), (2, None), (1, 3), (1, None)):
            query = torch.randn(num_heads, metadata.groups[-1].stop, 16).to(DEVICE)
            call = AttentionCall(0.25, window)
            got = backend.attend(query, 0, metadata, call)
            torch.testing.assert_close(got.double(), plain_attention(query, cache, spans, call), rtol=2e-5, atol=2e-5)


def test_chunks_need_what_the_host_knows_of_them() -> None:
    made = make_metadata([([0], 0, 3)], 4, DEVICE)
    metadata = AttentionMetadata(made.slot_mapping, made.groups, 4)
    backend = triton_attention.TritonBackend(make_cache(device=DEVICE))
    with pytest.raises(ValueError, match="make_metadata"):
        backend.attend(torch.zeros(2, 3, 16, device=DEVICE), 0, metadata, AttentionCall(1.0))


class CountedKernels:
    """The kernels, with a count of launches."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.launched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.launched.append(name)
        return getattr(self._kernels, name)


@pytest.mark.parametrize("num_long", [0, 3])
def test_a_layer_with_decodes_and_chunks_takes_at_most_three_launches(
    num_long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.manual_seed(0)
    sizes = [(length, 1) for length in range(32)] + [(start, 2 + start % 5) for start in range(32 - num_long)]
    spans, num_blocks = make_spans(sizes + [(300, 2)] * num_long, 4, generator)
    cache = make_cache(num_blocks=num_blocks, num_kv_heads=1, device=DEVICE)
    backend = triton_attention.TritonBackend(cache)
    counted = CountedKernels(backend._kernels)
    monkeypatch.setattr(backend, "_kernels", counted)
    monkeypatch.setattr(backend, "_min_keys_of_share", 100)
    monkeypatch.setattr(backend, "_num_programs", 528)
    metadata = make_metadata(spans, 4, DEVICE)
    query = torch.randn(2, metadata.groups[-1].stop, 16).to(DEVICE)
    new = torch.randn(2, 1, metadata.groups[-1].stop, 16).to(DEVICE)
    backend.store(new[0], new[1], 0, metadata)
    got = backend.attend(query, 0, metadata, AttentionCall(0.25))
    assert len(metadata.groups) == 33
    assert counted.launched == ["store", "attend", "combine"][: 3 if num_long else 2]
    want = plain_attention(query, cache, spans, AttentionCall(0.25))
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("transposed", [False, True])
def test_store_equals_the_base_class(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    spans, num_blocks = [([2, 0], 3, 1), ([1], 0, 3)], 3
    metadata = make_metadata(spans, 4, DEVICE)
    new = torch.randn(2, 3, 4, 6).to(DEVICE, dtype)  # keys and values, of 3 heads and 4 rows
    new[0, 0, 0, 0], new[0, 1, 2, 3], new[1, 2, 3, 5] = math.nan, math.inf, -math.inf
    if transposed:  # the layout of a projection: a row's heads are adjacent
        new = new.transpose(1, 2).contiguous().transpose(1, 2)
    caches = []
    for kind in (triton_attention.TritonBackend, SDPABackend):
        cache = make_cache(dtype, num_blocks=num_blocks, num_kv_heads=3, head_dim=6, device=DEVICE)
        cache.tensor.zero_()
        backend = kind(cache)
        backend.store(new[0], new[1], 0, metadata)
        caches.append(cache.tensor)
    assert caches[0].isfinite().logical_not().count_nonzero() == 3
    torch.testing.assert_close(*caches, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter uses nanmax
@pytest.mark.parametrize("num_shares", [1, 3])
def test_a_value_that_is_not_finite_affects_its_row_only(num_shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(num_blocks=24, device=DEVICE)
    metadata = make_metadata([(list(range(24)), 90, 1), (list(range(24)), 70, 1)], 4, DEVICE)
    query = torch.ones(4, 2, 16, device=DEVICE)
    query[1, 0, 3] = math.nan
    backend = triton_attention.TritonBackend(cache)
    monkeypatch.setattr(backend, "num_shares", lambda *_: num_shares)
    out = backend.attend(query, 0, metadata, AttentionCall(0.25))
    assert out.isnan().any(-1).tolist() == [[False, True, False, False], [False] * 4]


def test_keys_are_divided_only_if_the_gpu_would_be_idle_otherwise() -> None:
    backend = triton_attention.TritonBackend(make_cache(num_blocks=1, num_kv_heads=1, device=DEVICE))
    backend._num_programs = 528  # an H100: four for each of 132 multiprocessors
    assert backend.num_shares(8, 100_000) == MAX_SHARES
    assert backend.num_shares(8, 2048) == 8
    assert backend.num_shares(100, 100_000) == 5
    assert backend.num_shares(528, 100_000) == backend.num_shares(8, 100) == backend.num_shares(4096, 100) == 1


class Wrong(triton_attention.TritonBackend):
    """A miscompiled kernel, which loses the keys beyond the first tile."""

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        return super().attend(query, layer, metadata, replace(call, window=min(call.window or 64, 64)))


class Failing(triton_attention.TritonBackend):
    def attend(self, *_: object) -> torch.Tensor:
        raise RuntimeError("out of shared memory")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(triton_attention.TritonBackend, None), (Wrong, "differs from plain attention"), (Failing, "shared memory")],
)
def test_kernels_are_checked_over_long_sequences(
    kind: type[triton_attention.TritonBackend], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "PROBE_KEYS", 90)
    cache = make_cache(num_blocks=30, num_kv_heads=1, device=DEVICE)
    before = cache.tensor.clone()
    backend = kind(cache)
    backend.calls = {0: AttentionCall(0.25), 1: AttentionCall(0.25, window=4096), 2: AttentionCall(0.25)}
    if message is None:
        exactness.check_kernels(backend, 2)
    else:
        with pytest.raises(EngineStartError, match=message):
            exactness.check_kernels(backend, 2)
    assert torch.equal(cache.tensor, before)
