"""The compiled attention kernel equals plain attention; if it cannot be compiled, torch's attention serves."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir
from numba.core import config

from server.demo.tour import MODEL_DIRECTORY
from server.engine.attention.backend import AttentionCall, SDPABackend, make_metadata
from server.engine.cpu import amx_code, bf16_dot, cpu_attention
from server.engine.cpu.cpu_attention import MAX_POSITIONS, CPUBackend, divide_rows, make_backend
from server.engine.cpu.tile_code import TILE_KEYS
from server.engine.cpu.vector_code import LANES, VECTOR
from tests.support.engine.caches import CPU, make_cache, plain_attention

pytestmark = pytest.mark.slow

PRECISION = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(PRECISION)),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    block_size=st.integers(1, 17),
    group_size=st.integers(1, 4),
    head_dim=st.sampled_from([1, 7, 16, 32, 40, 64, 96]),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 50.0),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_decodes_equal_plain_attention(
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
    spans = [(table, length - 1, 1) for table, length in zip(tables, lengths, strict=True)]
    metadata = make_metadata(spans, block_size, CPU)
    call = AttentionCall(head_dim**-0.5, window, softcap, sinks)
    backend = CPUBackend(cache)
    backend.begin(metadata)
    got = backend.attend(query, 0, metadata, call)
    assert got.dtype is dtype
    want = plain_attention(query, cache, spans, call)
    torch.testing.assert_close(got.double(), want, rtol=PRECISION[dtype], atol=PRECISION[dtype])


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(PRECISION)),
    num_decodes=st.integers(0, 2),
    chunks=st.lists(
        st.tuples(st.integers(0, 3 * TILE_KEYS), st.integers(1, MAX_POSITIONS + 10)), min_size=1, max_size=3
    ),
    block_size=st.integers(1, 17),
    num_kv_heads=st.integers(1, 2),
    group_size=st.integers(1, 4),
    head_dim=st.sampled_from([1, 7, 16, 32, 40, 64, 80, 96, 128]),
    window=st.none() | st.integers(1, 3 * TILE_KEYS),
    softcap=st.none() | st.floats(0.5, 50.0),
    has_sinks=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_prefill_chunks_beside_decodes_equal_plain_attention(
    dtype: torch.dtype,
    num_decodes: int,
    chunks: list[tuple[int, int]],
    block_size: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    num_threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    sizes = [(5 + index, 1) for index in range(num_decodes)] + chunks
    counts = [-(-(start + count) // block_size) for start, count in sizes]
    tables = [table.tolist() for table in torch.split(torch.randperm(sum(counts)), counts)]
    spans = [(table, *size) for table, size in zip(tables, sizes, strict=True)]
    cache = make_cache(
        dtype, block_size=block_size, num_blocks=sum(counts), num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    num_heads = num_kv_heads * group_size
    query = torch.randn(num_heads, sum(count for _, count in sizes), head_dim).to(dtype)
    call = AttentionCall(head_dim**-0.5, window, softcap, torch.randn(num_heads).to(dtype) if has_sinks else None)
    backend = CPUBackend(cache)
    backend._num_threads = num_threads
    metadata = make_metadata(spans, block_size, CPU)
    backend.begin(metadata)
    got = backend.attend(query, 0, metadata, call)
    assert got.dtype is dtype
    want = plain_attention(query, cache, spans, call)
    tolerance = 1e-5 if dtype == torch.float32 else PRECISION[dtype]  # sums of more keys than in decodes
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_scores_of_any_size_are_exact_over_many_tiles(dtype: torch.dtype, size: float) -> None:
    """Large scores, whose largest is in any tile, rescale what was summed before."""
    torch.manual_seed(0)
    cache = make_cache(dtype, block_size=16, num_blocks=40, head_dim=64)
    query = size * torch.randn(4, 70, 64).to(dtype)
    spans = [(list(range(40)), 560, 70)]
    metadata = make_metadata(spans, 16, CPU)
    backend = CPUBackend(cache)
    backend.begin(metadata)
    call = AttentionCall(0.125)
    got = backend.attend(query, 0, metadata, call)
    tolerance = 5e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        got.double(), plain_attention(query, cache, spans, call), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("softcap", [1.0, 50.0, 1000.0])
def test_capped_scores_keep_their_digits(softcap: float) -> None:
    torch.manual_seed(0)
    cache = make_cache(block_size=16, num_blocks=40, head_dim=64)
    query = torch.randn(4, 70, 64)
    spans = [(list(range(40)), 560, 70)]
    metadata = make_metadata(spans, 16, CPU)
    backend = CPUBackend(cache)
    backend.begin(metadata)
    call = AttentionCall(0.125, softcap=softcap)
    got = backend.attend(query, 0, metadata, call)
    torch.testing.assert_close(got.double(), plain_attention(query, cache, spans, call), rtol=2e-6, atol=2e-6)


def test_a_row_does_not_depend_on_how_a_chunk_is_divided() -> None:
    torch.manual_seed(0)
    cache = make_cache(torch.bfloat16, block_size=16, num_blocks=40, head_dim=64)
    query = torch.randn(4, 300, 64).to(torch.bfloat16)
    call = AttentionCall(0.125, window=150)
    results = []
    for start, stop in ((0, 300), (171, 300), (250, 270)):
        metadata = make_metadata([(list(range(40)), 300 + start, stop - start)], 16, CPU)
        backend = CPUBackend(cache)
        backend.begin(metadata)
        results.append(backend.attend(query[:, start:stop], 0, metadata, call)[250 - start : 270 - start])
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


def test_vdpbf16ps_is_used_on_this_processor_only(monkeypatch: pytest.MonkeyPatch) -> None:
    has_bf16_dot = bf16_dot.has_bf16_dot.__wrapped__
    monkeypatch.setattr(config, "CPU_NAME", None)
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    for has in (True, False):
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda has=has: {"avx512bf16": has})
        assert has_bf16_dot() is has
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx512bf16": True})
    monkeypatch.setattr(config, "CPU_NAME", "x86-64-v3")
    assert not has_bf16_dot()
    monkeypatch.setattr(config, "CPU_NAME", None)
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2")
    assert not has_bf16_dot()


@pytest.mark.parametrize(
    ("missing", "is_permitted", "expected"),
    [(None, True, True), ("amx-tile", True, False), ("amx-bf16", True, False), (None, False, False)],
)
def test_amx_is_used_if_processor_and_system_allow_it(
    missing: str | None, is_permitted: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {name: name != missing for name in ("amx-tile", "amx-bf16")}
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(amx_code, "has_bf16_dot", lambda: True)
    monkeypatch.setattr(amx_code, "_is_permitted", lambda: is_permitted)
    assert amx_code.has_amx.__wrapped__() is expected
    monkeypatch.setattr(amx_code, "has_bf16_dot", lambda: False)  # another target is configured
    assert not amx_code.has_amx.__wrapped__()


def test_a_system_that_denies_the_registers_is_served_by_vectors() -> None:
    """In a separate process, whose kernels must not be read from the cache of processes that may use AMX."""
    script = """
import torch
from server.engine.cpu import amx_code
amx_code._is_permitted = lambda: False
from server.engine.attention.backend import AttentionCall, make_metadata
from server.engine.cpu.compiled import _KERNEL_CACHE
from server.engine.cpu.cpu_attention import CPUBackend
from server.engine.cpu.tile_code import TILE_ROWS, rows_of_tile
from numba import typeof
from tests.support.engine.caches import CPU, make_cache, plain_attention
torch.manual_seed(0)
cache = make_cache(torch.bfloat16, block_size=16, num_blocks=20, head_dim=64)
query = torch.randn(4, 90, 64).bfloat16()
spans = [(list(range(20)), 200, 90)]
backend, metadata, call = CPUBackend(cache), make_metadata(spans, 16, CPU), AttentionCall(0.125)
assert rows_of_tile(typeof(torch.zeros(1, dtype=torch.uint16).numpy())) == TILE_ROWS
backend.begin(metadata)
got = backend.attend(query, 0, metadata, call).double()
torch.testing.assert_close(got, plain_attention(query, cache, spans, call), rtol=1e-2, atol=1e-2)
print(_KERNEL_CACHE.name.endswith("-amx"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_llvm_knows_the_instruction_and_its_element_type() -> None:
    """llvmlite has no bfloat, so ``bf16_dot`` overrides a private method of its types to write one."""
    module = ir.Module()
    kind = ir.FunctionType(VECTOR, [VECTOR, bf16_dot._BFLOATS, bf16_dot._BFLOATS])
    ir.Function(module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    assert "<32 x bfloat>" in str(module), (
        "llvmlite's types no longer print themselves by _to_string: change bf16_dot.BFloat to the new way (or to "
        "llvmlite's own bfloat), or lower llvmlite's upper bound in pyproject.toml"
    )
    binding.parse_assembly(str(module)).verify()


def test_a_value_that_is_not_finite_affects_its_row_only() -> None:
    cache = make_cache(torch.float32, block_size=4, num_blocks=4)
    metadata = make_metadata([([0, 1], 7, 1), ([2, 3], 5, 1)], 4, CPU)
    query = torch.ones(2, 2, 16)
    query[1, 0, 3] = math.nan
    backend = CPUBackend(cache)
    backend.begin(metadata)
    out = backend.attend(query, 0, metadata, AttentionCall(1.0))
    assert out.isnan().any(-1).tolist() == [[False, True], [False, False]]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5000), max_size=80),
    chunks=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 300)), max_size=6),
    num_kv_heads=st.integers(1, 8),
    num_threads=st.integers(1, 16),
)
def test_keys_are_divided_evenly_among_threads(
    lengths: list[int], chunks: list[tuple[int, int]], num_kv_heads: int, num_threads: int
) -> None:
    spans = [(list(range(1250)), length - 1, 1) for length in lengths]
    spans += [(list(range(225)), start, count) for start, count in chunks]
    spans = spans or [([0], 0, 1)]
    metadata = make_metadata(spans, 4, CPU)
    divided = divide_rows(metadata.groups, 4, num_threads, num_kv_heads)
    seen = [start + offset + 1 for _, start, count in spans for offset in range(count)]
    assert divided.lengths.tolist() == seen
    is_single = [count == 1 for _, _, count in spans for _ in range(count)]
    assert sorted(divided.rows.tolist()) == [row for row, single in enumerate(is_single) if single]
    computed = [(row, head) for first, stop, head in divided.units for row in range(first, stop)]
    chunked = [row for row, single in enumerate(is_single) if not single]
    assert sorted(computed) == [(row, head) for row in chunked for head in range(num_kv_heads)]
    owners = [owner for owner, (_, _, count) in enumerate(spans) for _ in range(count)]
    for first, stop, _ in divided.units:
        assert owners[first] == owners[stop - 1]
        assert stop - first <= divided.max_positions <= MAX_POSITIONS
    for row, length in enumerate(seen):  # block tables ascend, so each sequence's slots do
        start = divided.starts[row]
        assert divided.slots[start : start + length].tolist() == list(range(length))
        assert len(divided.slots) >= start + length + (LANES if is_single[row] else TILE_KEYS) - 1
    assert len(divided.bounds) == len(divided.unit_bounds) == divided.num_threads + 1 <= num_threads + 1
    rows = [[seen[row] for row in part] for part in np.split(divided.rows, divided.bounds[1:-1])]
    units = [
        [sum(seen[first:stop]) for first, stop, _ in part]
        for part in np.split(divided.units, divided.unit_bounds[1:-1])
    ]
    for parts in (rows, units):
        # Longest first: no thread has more than another by more than its last item.
        loads = [sum(part) for part in parts]
        assert max(loads) - min(loads) <= max((item for part in parts for item in part), default=0)


@pytest.mark.parametrize(("size", "expected"), [((0, 2), 1), ((4000, 1), 2), ((200, 100), 2)])
def test_few_keys_are_left_to_one_thread(size: tuple[int, int], expected: int) -> None:
    metadata = make_metadata([(list(range(1250)), *size)], 4, CPU)
    assert divide_rows(metadata.groups, 4, 2, num_kv_heads=2).num_threads == expected


def test_torch_serves_if_the_kernels_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("LLVM does not know this processor")

    monkeypatch.setattr(cpu_attention, "attend_rows", fail)
    backend = make_backend(make_cache())
    assert type(backend) is SDPABackend
    assert "the attention kernels cannot be compiled" in caplog.text


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, CPUBackend), (torch.float16, SDPABackend)])
def test_the_backend_follows_the_dtype(dtype: torch.dtype, expected: type[SDPABackend]) -> None:
    assert type(make_backend(make_cache(dtype))) is expected


def test_the_configured_number_of_threads_is_in_force_after_loading() -> None:
    """In a separate process, because Numba's runtime starts once, and sets torch's number then."""
    script = f"""
import os, numba, torch
from server.config import EngineSettings
from server.engine.model.model_runner import ModelRunner
model = {str(MODEL_DIRECTORY)!r}
runner = ModelRunner(EngineSettings(model=model, dtype="float32", kv_cache_memory=1 << 24, num_threads=1))
print(torch.get_num_threads(), numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
rows, weight = torch.randn(64, 2048), torch.randn(2048, 2048)
before = len(os.listdir("/proc/self/task"))
rows @ weight
print(len(os.listdir("/proc/self/task")) - before)
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "2", "0"], done.stderr


def test_processors_without_bfloat16_products_use_float32() -> None:
    """In a separate process, whose kernels are compiled for this processor without AVX512_BF16."""
    script = """
import torch
from server.engine.attention.backend import AttentionCall, make_metadata
from server.engine.cpu.bf16_dot import has_bf16_dot
from server.engine.cpu.cpu_attention import CPUBackend
from tests.support.engine.caches import CPU, make_cache, plain_attention
torch.manual_seed(0)
assert not has_bf16_dot()
cache = make_cache(torch.bfloat16, block_size=16, num_blocks=40, head_dim=40)
query = torch.randn(6, 103, 40).to(torch.bfloat16)
spans = [([0, 1], 20, 1), ([2, 3, 4], 30, 2), ([*range(5, 25)], 200, 100)]
metadata, call = make_metadata(spans, 16, CPU), AttentionCall(0.2, window=150)
backend = CPUBackend(cache)
backend.begin(metadata)
want = plain_attention(query, cache, spans, call)
print((backend.attend(query, 0, metadata, call) - want).abs().max().item())
"""
    features = binding.get_host_cpu_features()
    features["avx512bf16"] = False
    environment = {**os.environ, "NUMBA_CPU_FEATURES": features.flatten()}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-2, done.stderr
