"""Keys and values take what the weights, the largest step and the graphs leave. Over a fake of torch.cuda."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

from server.engine.attention.kv_cache import KVCache, max_blocks, min_blocks
from server.engine.llm_engine import LLMEngine
from server.engine.model.largest_step import LargestStep, widest_adapter
from server.engine.model.platform import Platform
from server.errors import EngineStartError
from tests.support.engine.fake_cuda import FakeCUDA, FakeMemory, fake_cuda_platform
from tests.support.engine.harness import Family, add, greedy, random_text, run, tokens
from tests.support.presence import present

pytestmark = pytest.mark.slow

MIB = 2**20
LIMITS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": None,
    "adapter_device_bytes": 0,
    "max_adapter_rank": 4,
}
CONTEXT = 256
REFERENCES = 200_000
"""Bytes of the logits and inputs of ``ExactnessCheck``, and of the adapter of ``AdapterCheck``, at most."""

MakeEngine = Callable[..., LLMEngine]


def start(make_engine: MakeEngine, family: Family, patch: pytest.MonkeyPatch, **settings: Any) -> LLMEngine:
    platform = fake_cuda_platform(patch)
    patch.setattr(
        platform, "copy_stream", lambda: None
    )  # its buffers are pinned on the host, which is the device here
    return make_engine(family, platform, **LIMITS | settings)


def step_of(engine: LLMEngine) -> LargestStep:
    runner = engine.runner
    return LargestStep(
        paged_model=runner.paged_model,
        sampler=runner.sampler,
        scorer=runner._scorer,
        embed=runner.embed_tokens,
        max_model_len=engine.model.max_model_len,
        max_num_seqs=LIMITS["max_num_seqs"],
        max_num_batched_tokens=LIMITS["max_num_batched_tokens"],
        make_adapter=lambda: widest_adapter(present(runner.paged_model.adapter_backend), runner.dtype, 4),
    )


def test_keys_and_values_take_what_the_rest_leaves(
    llama: Family, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is in use and the peak of the largest step are counted again, after the start."""
    caplog.set_level("INFO")
    memory = FakeMemory(total=15 * MIB, others=MIB, per_graph=MIB)
    with FakeCUDA(monkeypatch, memory=memory) as cuda, memory.live:
        engine = start(make_engine, llama, monkeypatch)
        spec, num_blocks = engine.runner.cache_spec, engine.model.num_blocks
        assert min_blocks(spec, CONTEXT) < num_blocks < max_blocks(spec, CONTEXT, LIMITS["max_num_seqs"])
        assert f"for keys and values of {num_blocks * 16} tokens" in caplog.text
        # Recorded for the small cache, released, and recorded again.
        sizes = len(engine.runner._graphs.sizes) if engine.runner._graphs is not None else 0
        assert (cuda.num_captures, len(cuda.graphs)) == (2 * sizes, sizes)
        used, step = cuda.used, step_of(engine)
        memory.live.reset_peak()
        step.run()
        peak = used + memory.live.peak - memory.live.current
        assert cuda.used == used  # the step leaves nothing
        usable = int(0.9 * memory.total)
        # The references of the checks were in use while the memory was measured.
        assert usable - REFERENCES - 2 * spec.block_bytes < peak <= usable
        texts = [random_text(Random(index), 5, 30) for index in range(5)]  # padded to six rows
        for index, text in enumerate(texts):
            add(engine, str(index), text, greedy(8))
        outputs = run(engine)
        assert cuda.num_replays > 2 * sizes
    for index, text in enumerate(texts):
        assert tokens(outputs[str(index)]) == llama.expected(None, text, 8)


def test_a_higher_peak_and_a_lower_utilization_leave_fewer_blocks(
    llama: Family, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does the memory for adapters."""
    counts = []
    for extra_peak, others, utilization, adapters in (
        (0, 0, 0.9, 0),
        (MIB // 2, 0, 0.9, 0),
        (0, MIB // 2, 0.9, 0),
        (0, 0, 0.85, 0),
        (0, 0, 0.9, MIB // 2),
    ):
        memory = FakeMemory(total=8 * MIB, others=others, extra_peak=extra_peak)
        with monkeypatch.context() as patch, FakeCUDA(patch, memory=memory), memory.live:
            limits = {"enforce_eager": True, "max_num_seqs": 64, "gpu_memory_utilization": utilization}
            limits |= {"adapter_device_bytes": adapters}
            engine = start(make_engine, llama, patch, **limits)
            counts.append(engine.model.num_blocks)
            spec, size = engine.runner.cache_spec, engine.runner.cache_spec.block_bytes
            engine.close()
            del engine
    most, of_peak, of_others, of_utilization, of_adapters = counts
    assert most < max_blocks(spec, CONTEXT, 64)
    halves = [(count, MIB // 2) for count in (of_peak, of_others, of_adapters)]
    for count, less in (*halves, (of_utilization, 0.05 * memory.total)):
        assert abs((most - count) * size - less) <= size


@pytest.mark.parametrize("is_eager", [False, True])
def test_too_little_memory_is_refused_with_what_is_needed(
    is_eager: bool, llama: Family, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(total=32 * MIB, others=30 * MIB)  # more than may be used
    with FakeCUDA(monkeypatch, memory=memory), memory.live, pytest.raises(EngineStartError) as caught:
        start(make_engine, llama, monkeypatch, enforce_eager=is_eager)
    assert re.fullmatch(
        r"one sequence of 256 positions needs 0.03 GiB: .* for the weights, .* for the largest step, .* for CUDA "
        r"graphs, 0.03 GiB outside of torch .CUDA and other processes., .* for keys and values; 0.03 GiB may be "
        r"used, 0.9 of 0.03 GiB: raise --gpu-memory-utilization, or lower --max-model-len, --max-num-batched-tokens "
        r"or --max-num-seqs",
        str(caught.value),
    )


@pytest.mark.parametrize("is_enough", [False, True])
def test_an_explicit_size_is_used_as_it_is(
    is_enough: bool,
    llama: Family,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = FakeMemory(extra_peak=0 if is_enough else 2**40)
    with FakeCUDA(monkeypatch, memory=memory) as cuda, memory.live:
        engine = start(make_engine, llama, monkeypatch, kv_cache_memory=MIB)
        assert engine.model.num_blocks == MIB // engine.runner.cache_spec.block_bytes
        assert cuda.num_captures == len(cuda.graphs)  # recorded once
    assert ("it may fail; lower --kv-cache-memory" in caplog.text) != is_enough


def test_a_model_that_cannot_be_recorded_gets_the_memory_of_the_graphs(
    llama: Family, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = FakeMemory(total=8 * MIB, per_graph=MIB)
    with FakeCUDA(monkeypatch, memory=memory, breaks_captures=True) as cuda, memory.live:
        engine = start(make_engine, llama, monkeypatch)
        assert (cuda.num_captures, len(cuda.graphs)) == (1, 0)  # not tried again
        assert min_blocks(engine.runner.cache_spec, CONTEXT) < engine.model.num_blocks
    assert caplog.text.count("do not use CUDA graphs") == 1


def fail(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")


@pytest.mark.parametrize(
    ("patched", "name", "message"),
    [
        (LargestStep, "run", "the largest step does not fit .*Tried to allocate 9.00 GiB.*lower --max-num-batched"),
        (KVCache, "resize", "of keys and values cannot be allocated .*lower --gpu-memory-utilization"),
    ],
)
def test_memory_that_is_not_there_fails_the_start(
    patched: type,
    name: str,
    message: str,
    llama: Family,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patched, name, fail)
    with FakeCUDA(monkeypatch), pytest.raises(EngineStartError, match=message):
        start(make_engine, llama, monkeypatch, enforce_eager=True)


@pytest.mark.parametrize(
    ("num_seqs", "num_rows", "lengths"),
    [
        (3, 64, [1, 1, 62]),
        (3, 600, [88, 256, 256]),
        (4, 4, [1, 1, 1, 1]),
        (2, 600, [256, 256]),  # no step can have more
        (1, 1, [1]),
    ],
)
def test_the_largest_step_has_all_rows_and_sequences(
    num_seqs: int, num_rows: int, lengths: list[int], llama: Family, make_engine: MakeEngine
) -> None:
    engine = make_engine(llama, Platform(torch.device("cpu")))
    step = replace(step_of(engine), max_num_seqs=num_seqs, max_num_batched_tokens=num_rows)
    chunks = step.chunks()
    assert [chunk.num_tokens for chunk in chunks] == lengths
    assert all(chunk.samples and chunk.needs_logits for chunk in chunks)
    assert all(chunk.stop == (CONTEXT if chunk.num_tokens > 1 else 1) for chunk in chunks)
    assert all(max(chunk.block_table) < engine.model.num_blocks for chunk in chunks)
    seqs = [present(chunk.seq) for chunk in chunks]
    assert [seq.wants_prompt_logprobs for seq in seqs] == [length > 1 for length in lengths]
    step.run()


def test_the_largest_step_scores_checks_and_samples_every_row(
    llama: Family, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, Platform(torch.device("cpu")))
    step, calls = step_of(engine), Counter[str]()
    rows = LIMITS["max_num_batched_tokens"] - LIMITS["max_num_seqs"] + 1

    def score(*arguments: Any) -> Any:
        calls["scored"] += len(scores := original(*arguments)["0"])
        assert len(scores) == rows - 1
        return {}

    original = step.scorer.score
    monkeypatch.setattr(step.scorer, "score", score)
    choose = step.sampler.choose

    def chosen(logits: torch.Tensor, seqs: Any) -> Any:
        calls["sampled"] += len(logits)
        result = choose(logits, seqs)
        assert all(present(entry).top for entry in result[1])
        return result

    monkeypatch.setattr(step.sampler, "choose", chosen)
    are_finite = engine.runner.cache.are_finite

    def checked(blocks: Any) -> torch.Tensor:
        calls["checked"] += len(blocks)
        return are_finite(blocks)

    monkeypatch.setattr(engine.runner.cache, "are_finite", checked)
    step.run()
    assert calls == {"scored": rows - 1, "sampled": 2 * LIMITS["max_num_seqs"], "checked": rows // 16}
