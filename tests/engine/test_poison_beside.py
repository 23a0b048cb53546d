"""Whole models: poison in a batch, and in the blocks that it leaves, changes no bit of the logits of healthy rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from scripts import soak_poison
from server.config import EngineSettings
from server.engine.cpu.packed_linear import can_pack, pack_linears
from server.engine.llm_engine import LLMEngine
from server.engine.model import exactness
from server.engine.model.model_runner import ModelRunner
from server.engine.model.platform import Platform
from tests.support.engine.harness import Family
from tests.support.engine.platforms import PlainPlatform

pytestmark = pytest.mark.slow

POISONS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30]
Make = Callable[[str], Family]
Runners = Callable[[str, str, str, int], ModelRunner]


@pytest.fixture(scope="module")
def runners(make_family: Make) -> Iterator[Runners]:
    """Engines by (family, backend, dtype, block size), each made once."""
    made: dict[tuple[str, str, str, int], ModelRunner] = {}
    with ExitStack() as stack:

        def get(name: str, backend: str, dtype: str, block_size: int) -> ModelRunner:
            key = name, backend, dtype, block_size
            if key not in made:
                with platform_with(backend) as platform:
                    options = EngineSettings(
                        model=str(make_family(name).path),
                        dtype=dtype,  # type: ignore[arg-type] # a parameter of the test
                        block_size=block_size,
                        kv_cache_memory=4 * 2**20,
                        max_num_seqs=8,
                        enforce_eager=True,
                    )
                    engine = LLMEngine(options, platform=platform)
                stack.callback(engine.close)
                made[key] = engine.runner
            return made[key]

        yield get


class PackedPlatform(PlainPlatform):
    """torch's attention over packed products, as on a CPU without Numba; unpacked ones may read other rows (AMX)."""

    def prepare(self, model: PreTrainedModel) -> None:
        if can_pack(model.dtype):
            pack_linears(model)


@contextmanager
def platform_with(backend: str) -> Iterator[Platform | None]:
    """The platform whose engine attends by this backend; the machine's own for the compiled kernels."""
    if backend == "compiled":
        yield None
    elif backend == "triton":
        from tests.support.engine.triton import DEVICE, triton_attention

        with patch.object(exactness, "PROBE_KEYS", 48):  # the interpreter is slow
            yield PlainPlatform([triton_attention.TritonBackend], device=DEVICE)
    else:
        yield PackedPlatform()


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Sequences with something in the cache already, some poisoned by what is there, some by their new rows."""
    return {
        "seqs": draw(
            st.lists(
                st.tuples(
                    st.sampled_from(["healthy", "healthy", "keys", "rows"]), st.integers(0, 30), st.integers(1, 20)
                ),
                min_size=2,
                max_size=6,
            )
        ),
        "poison": draw(st.sampled_from(POISONS)),
        "seed": draw(st.integers(0, 2**16)),
    }


def logits_of_healthy(runner: ModelRunner, batch: dict[str, Any], poison: float | None) -> list[torch.Tensor]:
    """Of a mixed step, a step of decodes, and a step of others in the blocks that the poisoned ones had.

    Without poison its sequences are random, of the same shape, and what nobody wrote is zero.
    """
    generator = torch.Generator().manual_seed(batch["seed"])
    size, cache, dtype = runner.cache_spec.block_size, runner.cache, runner.dtype
    limits = torch.finfo(dtype)
    value = 0.0 if poison is None else max(limits.min, min(limits.max, poison)) if math.isfinite(poison) else poison
    cache.tensor.fill_(value)
    # Decodes first, as a step has them; all have room for one token more.
    seqs = sorted(batch["seqs"], key=lambda seq: seq[2] > 1)
    counts = [-(-(start + count + 1) // size) for _, start, count in seqs]
    tables = [
        (own + 1).tolist()
        for own in torch.split(torch.randperm(cache.num_blocks - 1, generator=generator)[: sum(counts)], counts)
    ]
    healthy_rows: list[int] = []
    spans, embeds, row = [], [], 0
    width = runner.info.embedding_width
    for (kind, start, count), table in zip(seqs, tables, strict=True):
        for position in range(start):
            new = torch.randn(2, *cache.tensor.shape[1:2], *cache.tensor.shape[4:], generator=generator).to(dtype)
            if kind != "keys" or poison is None:
                cache.tensor[:, :, table[position // size], position % size] = new
        rows = torch.randn(count, width, generator=generator)
        if kind == "rows" and poison is not None:
            rows[count // 2 :] = value
        spans.append((table, start, count))
        embeds.append(rows.to(dtype))
        healthy_rows += range(row, row + count) if kind == "healthy" else []
        row += count
    results = [
        runner.paged_model.forward(spans, {"inputs_embeds": torch.cat(embeds)[None]}, range(row))[healthy_rows]
    ]
    decoding = [index for index, (kind, *_) in enumerate(seqs) if kind == "healthy"]
    ids = [7 + index for index in range(len(seqs))]
    positions = [start + count for _, start, count in seqs]
    results.append(runner.paged_model.launch_decodes(ids, positions, tables, len(seqs))[decoding])
    # The poisoned are gone; their blocks, shortest first, are those of a text.
    left = sorted((table for table, (kind, *_) in zip(tables, seqs, strict=True) if kind != "healthy"), key=len)
    blocks = [block for table in left for block in table]
    if blocks:
        length = max(1, len(blocks) * size - size // 2)
        text = torch.randint(0, 190, (1, length), generator=generator)
        results.append(runner.paged_model.forward([(blocks, 0, length)], {"input_ids": text}, range(length)))
    return [result.clone() for result in results]


def check(runner: ModelRunner, batch: dict[str, Any]) -> None:
    with torch.inference_mode():
        alone = logits_of_healthy(runner, batch, None)
        beside = logits_of_healthy(runner, batch, batch["poison"])
    for want, got in zip(alone, beside, strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        ("llama", "compiled", "float32"),
        ("llama", "compiled", "bfloat16"),
        ("qwen3", "compiled", "bfloat16"),
        ("gemma2", "compiled", "float32"),
        ("gpt2", "compiled", "float32"),
        ("llama", "torch", "float32"),
        ("llama", "torch", "bfloat16"),
        ("llama", "torch", "float16"),
        ("gemma2", "torch", "float32"),
        ("mistral", "torch", "float32"),
    ],
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_healthy_logits_are_the_same_beside_poison_and_after_it(
    name: str, backend: str, dtype: str, block_size: int, runners: Runners, batch: dict[str, Any]
) -> None:
    check(runners(name, backend, dtype, block_size), batch)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # as the interpreter finds maxima
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 5), ("bfloat16", 16)])
def test_healthy_logits_are_the_same_over_triton_s_kernels(dtype: str, block_size: int, runners: Runners) -> None:
    runner = runners("llama", "triton", dtype, block_size)
    seqs = [("healthy", 9, 1), ("keys", 17, 1), ("healthy", 0, 5), ("rows", 2, 4)]  # few: the interpreter is slow
    for poison in (math.nan, 3e38):
        check(runner, {"seqs": seqs, "poison": poison, "seed": 1})


@pytest.mark.parametrize(("backend", "block_size"), [("compiled", 16), ("torch", 5)])
def test_a_short_soak_with_poison(backend: str, block_size: int) -> None:
    counts = soak_poison.soak(80, seed=3, backend=backend, block_size=block_size)
    assert min(counts["healthy"], counts["poison: not_finite"]) > 2
