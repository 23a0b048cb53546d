"""Values in the cache, or in the batch, that are not finite change no bit of another sequence's attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from server.engine.attention.backend import AttentionBackend, AttentionCall, SDPABackend, make_metadata
from server.engine.attention.kv_cache import KVCache
from server.engine.cpu.cpu_attention import CPUBackend
from tests.support.engine.caches import CPU, make_cache

pytestmark = pytest.mark.slow

DTYPES = {
    "sdpa": [torch.float32, torch.bfloat16, torch.float16],
    "compiled": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
}
POISONS = [math.nan, math.inf, -math.inf, 3e38, -3e38]
Span = tuple[list[int], int, int]


def make_backend(kind: str, cache: KVCache) -> AttentionBackend:
    if kind == "triton":
        from tests.support.engine.triton import triton_attention

        backend = triton_attention.TritonBackend(cache)
        vars(backend)["num_shares"] = lambda *_: 2
        vars(backend).update(_min_keys_of_share=16, _num_programs=1000)
        return backend
    return {"sdpa": SDPABackend, "compiled": CPUBackend}[kind](cache)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """The chunks of a step, some of them poisoned, over scattered blocks of a larger cache."""
    block_size = draw(st.integers(1, 17))
    decodes = draw(st.lists(st.tuples(st.integers(0, 50), st.just(1)), max_size=4))
    chunks = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(2, 20)), max_size=3))
    sizes = decodes + chunks or [(9, 1)]
    return {
        "block_size": block_size,
        "sizes": sizes,
        "poisoned": draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))),
        "poison": draw(st.sampled_from(POISONS)),
        "num_kv_heads": draw(st.integers(1, 2)),
        "group_size": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([4, 16, 32, 40])),
        "window": draw(st.none() | st.integers(1, 60)),
        "softcap": draw(st.none() | st.floats(0.5, 50.0)),
        "has_sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def attend_twice(kind: str, dtype: torch.dtype, step: dict[str, Any]) -> None:
    """Compute a step over a cache of zeros and over one of poison; the healthy rows must be bit-equal."""
    generator = torch.manual_seed(step["seed"])
    block_size, head_dim, num_kv_heads = step["block_size"], step["head_dim"], step["num_kv_heads"]
    sizes: list[tuple[int, int]] = step["sizes"]
    counts = [-(-(start + count) // block_size) for start, count in sizes]
    num_blocks = sum(counts) + 3
    # Short tables are padded with block 0, so no sequence owns it.
    scattered = torch.randperm(num_blocks - 1, generator=generator)[: sum(counts)] + 1
    tables = [own.tolist() for own in torch.split(scattered, counts)]
    spans: list[Span] = [(table, *size) for table, size in zip(tables, sizes, strict=True)]
    num_heads, num_rows = num_kv_heads * step["group_size"], sum(count for _, count in sizes)
    query = torch.randn(num_heads, num_rows, head_dim).to(dtype)
    own = torch.randn(2, num_blocks + 1, block_size, num_kv_heads, head_dim).to(dtype)
    sinks = torch.randn(num_heads).to(dtype) if step["has_sinks"] else None
    call = AttentionCall(head_dim**-0.5, step["window"], step["softcap"], sinks)
    is_healthy = torch.tensor(
        [not bad for (_, count), bad in zip(sizes, step["poisoned"], strict=True) for _ in range(count)]
    )
    results = []
    poison = max(torch.finfo(dtype).min, min(torch.finfo(dtype).max, step["poison"]))
    for fill in (0.0, poison if math.isfinite(step["poison"]) else step["poison"]):
        cache = make_cache(
            dtype, block_size=block_size, num_blocks=num_blocks, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        cache.tensor.fill_(fill)
        poisoned_query = query.clone()
        row = 0
        for (table, start, count), bad in zip(spans, step["poisoned"], strict=True):
            if bad:
                poisoned_query[:, row : row + count] = fill
            else:
                for position in range(start + count):
                    place = table[position // block_size], position % block_size
                    cache.tensor[:, 0, *place] = own[:, *place]
            row += count
        metadata = make_metadata(spans, block_size, CPU)
        backend = make_backend(kind, cache)
        backend.begin(metadata)
        results.append(backend.attend(poisoned_query, 0, metadata, call)[is_healthy])
    assert results[0].isfinite().all()
    assert torch.equal(*results)


LONG = {
    "block_size": 16,
    "sizes": [(3, 1), (70, 1), (600, 9), (0, 5)],
    "poisoned": [False, True, False, True],
    "poison": math.nan,
    "num_kv_heads": 2,
    "group_size": 2,
    "head_dim": 32,
    "window": None,
    "softcap": None,
    "has_sinks": False,
    "seed": 0,
}
"""A step with a chunk that the compiled backend computes by SDPA, among rows that its kernel computes."""


@pytest.mark.parametrize("dtype", DTYPES["sdpa"])
@settings(max_examples=60)
@given(step=steps())
@example(step=LONG)
@example(step=LONG | {"poison": 3e38, "window": 30})
@example(step=LONG | {"poison": -3e38, "softcap": 2.0})
def test_poison_reaches_no_row_of_torch_s_attention(dtype: torch.dtype, step: dict[str, Any]) -> None:
    attend_twice("sdpa", dtype, step)


@pytest.mark.parametrize("dtype", DTYPES["compiled"])
@settings(max_examples=60)
@given(step=steps())
@example(step=LONG)
@example(step=LONG | {"poison": 3e38, "window": 30})
@example(step=LONG | {"poison": -3e38, "softcap": 2.0})
def test_poison_reaches_no_row_of_the_compiled_kernels(dtype: torch.dtype, step: dict[str, Any]) -> None:
    attend_twice("compiled", dtype, step)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter uses nanmax
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES["triton"])
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # the interpreter is slow
@given(step=steps())
@example(step=LONG | {"sizes": [(3, 1), (70, 1), (30, 5), (0, 5)]})
@example(step=LONG | {"sizes": [(3, 1), (70, 1), (30, 5), (0, 5)], "poison": 3e38, "window": 9})
def test_poison_reaches_no_row_of_triton_s_kernels(dtype: torch.dtype, step: dict[str, Any]) -> None:
    attend_twice("triton", dtype, step)
