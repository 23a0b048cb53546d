"""Many soft prompts over a small budget: memory is bounded, and no token is wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from prompt_store.types import ROWS_TENSOR
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.types import SoftPromptSource
from tests.support.engine.harness import Family, add, greedy, random_text, run, tokens
from tests.support.vllm import make_vllm_family, needs_vllm
from tests.support.vllm_engine import MAX_TOKENS, Engine, copy_of

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

KEYS = ("prompt_tuning_20", "prefix_13")
NUM_SOFT_PROMPTS = 1000
BLOCK_BYTES = 3 * 2 * 32 * 2 * 32 * 4
"""One block of 32 positions: three layers, keys and values of two heads of 32, float32."""
BUDGET = 64 * BLOCK_BYTES
NUM_ROUNDS = 4
MAX_GROWTH = 12_000_000
"""Growth of all processes in bytes over 1,000 loads; they would take 34 MB if nothing were evicted."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(make_vllm_family("llama", tmp_path_factory.mktemp("family"), KEYS), BUDGET)
    yield engine
    engine.close()


def variants(family: Family, folder: Path) -> list[SoftPromptSource]:
    """Soft prompts of both kinds, each with other rows."""
    found = []
    for index in range(NUM_SOFT_PROMPTS):
        source = copy_of(family.soft_prompts[KEYS[index % 2]], folder, f"variant{index}")
        rows = load_file(source.path)[ROWS_TENSOR]
        torch.manual_seed(index)
        save_file({ROWS_TENSOR: rows[torch.randperm(len(rows))] * (0.5 + torch.rand(len(rows), 1))}, source.path)
        found.append(source)
    return found


def answers_of_the_native_engine(family: Family, sources: list[SoftPromptSource], text: list[int]) -> list[list[int]]:
    native = LLMEngine(EngineSettings(model=str(family.path), dtype="float32", kv_cache_memory=64 * 2**20))
    for index, source in enumerate(sources):
        add(native, str(index), text, greedy(MAX_TOKENS), soft_prompt=source)
    outputs = run(native)
    native.close()
    return [tokens(outputs[str(index)]) for index in range(len(sources))]


def resident_bytes() -> int:
    """Memory of the engine's processes."""
    (own,) = [child for child in psutil.Process().children() if "server.engine.vllm.main" in child.cmdline()]
    found: int = sum(process.memory_info().rss for process in [own, *own.children(recursive=True)])
    return found


def test_1000_soft_prompts_over_a_budget_for_64(engine: Engine, tmp_path: Path) -> None:
    sources, text = variants(engine.family, tmp_path), random_text(random.Random(5), 6, 6)
    expected = answers_of_the_native_engine(engine.family, sources, text)
    assert len({tuple(answer) for answer in expected}) > 50, "a mix-up would not be seen"

    async def ask(part: list[SoftPromptSource]) -> list[list[int]]:
        gate = asyncio.Semaphore(32)

        async def one(source: SoftPromptSource) -> list[int]:
            async with gate:
                return await engine.ask(source, text)

        return await asyncio.gather(*(one(source) for source in part))

    sizes = []
    for _ in range(NUM_ROUNDS):  # each is cold again, but for the newest
        assert engine.run(ask(sources)) == expected
        sizes.append(resident_bytes())
    # Allocators grow to their size in the first rounds, and stay there.
    assert min(after - before for before, after in pairwise(sizes)) < MAX_GROWTH, sizes
    host = engine.engine.stats.host
    assert host.evictions >= NUM_ROUNDS * (NUM_SOFT_PROMPTS - 64 - 32 - 64)
    # A computed soft prompt that awaits its first use is not counted; at most 64 of them are.
    assert host.resident_bytes <= BUDGET + 64 * BLOCK_BYTES
    assert engine.engine.stats.num_used_blocks == 0
    assert engine.engine.stats.restarts == 0
