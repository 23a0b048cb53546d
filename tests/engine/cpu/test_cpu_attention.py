"""The compiled attention kernel equals plain attention; if it cannot be compiled, torch's attention serves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir
from numba.core import config

from server.demo.tour import MODEL_DIRECTORY
from server.engine.attention.backend import AttentionCall, SDPABackend, make_metadata
from server.engine.cpu import bf16_dot, cpu_attention
from server.engine.cpu.cpu_attention import MAX_KERNEL_KEYS, UNIT_ROWS, CPUBackend, divide_rows, make_backend
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


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(list(PRECISION)),
    num_decodes=st.integers(0, 3),
    chunks=st.lists(st.tuples(st.integers(0, 40), st.integers(2, 40)), max_size=4),
    long_chunk=st.none() | st.integers(2, 30),
    call=st.builds(
        AttentionCall, st.just(0.25), st.none() | st.integers(1, 60), st.none() | st.floats(1.0, 30.0), st.none()
    ),
    has_sinks=st.booleans(),
    num_threads=st.integers(1, 2),
)
def test_decodes_and_prefills_of_one_step_equal_sdpa(
    dtype: torch.dtype,
    num_decodes: int,
    chunks: list[tuple[int, int]],
    long_chunk: int | None,
    call: AttentionCall,
    has_sinks: bool,
    num_threads: int,
) -> None:
    torch.manual_seed(0)
    sizes = [(5 + index, 1) for index in range(num_decodes)] + chunks
    sizes += [(MAX_KERNEL_KEYS - 1, long_chunk)] if long_chunk else []
    sizes = sizes or [(0, 3)]
    spans, num_blocks = [], 0
    for start, count in sizes:
        blocks = -(-(start + count) // 4)
        spans.append((list(range(num_blocks, num_blocks + blocks)), start, count))
        num_blocks += blocks
    cache = make_cache(dtype, block_size=4, num_blocks=num_blocks)
    metadata = make_metadata(spans, cache.spec.block_size, CPU)
    query = torch.randn(6, sum(count for _, count in sizes), 16).to(dtype)
    call = replace(call, sinks=torch.randn(6).to(dtype) if has_sinks else None)
    results = []
    compiled = CPUBackend(cache)
    compiled._num_threads = num_threads
    for backend in (SDPABackend(cache), compiled):
        backend.begin(metadata)
        results.append(backend.attend(query, 0, metadata, call))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


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


def test_llvm_knows_the_instruction_and_its_element_type() -> None:
    """llvmlite has no bfloat, so ``bf16_dot`` overrides a private method of its types to write one."""
    module = ir.Module()
    kind = ir.FunctionType(VECTOR, [VECTOR, bf16_dot._BFLOATS, bf16_dot._BFLOATS])
    ir.Function(module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    assert "<32 x bfloat>" in str(module), (
        "llvmlite's types no longer print themselves by _to_string: change bf16_dot._BFloat to the new way (or to "
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
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=80),
    chunks=st.lists(st.tuples(st.integers(0, 600), st.integers(2, 90)), max_size=6),
    num_threads=st.integers(1, 16),
)
def test_keys_are_divided_evenly_among_threads(
    lengths: list[int], chunks: list[tuple[int, int]], num_threads: int
) -> None:
    spans = [(list(range(1250)), length - 1, 1) for length in lengths]
    spans += [(list(range(175)), start, count) for start, count in chunks]
    metadata = make_metadata(spans, 4, CPU)
    divided = divide_rows(metadata.groups, 4, num_threads)
    seen = [start + offset + 1 for _, start, count in spans for offset in range(count)]
    left = [
        row
        for index in divided.sdpa_groups
        for row in range(metadata.groups[index].start, metadata.groups[index].stop)
    ]
    assert sorted([*divided.rows.tolist(), *left]) == list(range(len(seen)))
    assert all(seen[row] == divided.lengths[row] for row in divided.rows)
    assert len(divided.sdpa_groups) == sum(start + count > MAX_KERNEL_KEYS for start, count in chunks)
    for row in divided.rows:  # block tables ascend, so each sequence's slots do
        start, length = divided.starts[row], divided.lengths[row]
        assert divided.slots[start : start + length].tolist() == list(range(length))
        assert len(divided.slots) >= start + length + LANES - 1
    parts = np.split(divided.rows, divided.bounds[1:-1])
    assert len(parts) <= num_threads
    loads = [sum(seen[row] for row in part) for part in parts]
    # Longest first: no thread has more than another by more than its last unit.
    assert max(loads) - min(loads) <= max(*lengths, UNIT_ROWS * MAX_KERNEL_KEYS)


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


def test_a_step_of_long_chunks_only_does_not_call_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(num_blocks=130)
    metadata = make_metadata([([*range(130)], 500, 20)], 4, CPU)
    backend = CPUBackend(cache)
    monkeypatch.setattr(cpu_attention, "attend_rows", None)
    backend.begin(metadata)
    assert backend.attend(torch.randn(2, 20, 16), 0, metadata, AttentionCall(0.25)).shape == (20, 2, 16)


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
