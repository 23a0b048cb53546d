"""Greedy tokens of vLLM equal PEFT's: every type in one batch, chunked, preempted, cached, and for two tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.vllm import make_vllm_family, needs_vllm, questions
from tests.support.vllm_engine import Engine

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

CHUNKS_OF_16 = {"max_num_seqs": 16, "max_num_batched_tokens": 16}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
WAYS: dict[str, dict[str, Any]] = {
    "llama": CHUNKS_OF_16,
    "mistral": {},
    "gemma2": CHUNKS_OF_16,
    "gemma3": {},
    "gpt2": {},
}
MEMORY = {"gpt2": 1200 * 2**10}
"""Key/value memory of 12 blocks of 32 tokens, for 32 sequences of up to 4 blocks each."""


@pytest.mark.parametrize("name", WAYS)
def test_all_types_equal_peft_in_one_batch(name: str, tmp_path: Path) -> None:
    family = make_vllm_family(name, tmp_path)
    asked = questions(family, 42)
    with Engine(
        family, 2**22, max_model_len=160, kv_cache_memory=MEMORY.get(name, 600 * 2**10), **WAYS[name]
    ) as engine:
        # So little memory keeps nothing between the rounds, but blocks are given up and taken over all the time.
        for tenant in ("a", "a", "b"):
            engine.check(asked, salt=tenant)
        assert engine.engine.stats.num_preemptions > 0


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gemma3", {"tensor_parallel_size": 2, **CHUNKS_OF_16}),
        ("qwen3", {"enable_prefix_caching": False}),
        ("llama", {"engine_args": msgspec.json.encode({"speculative_config": SPECULATION}).decode()}),
    ],
    ids=["tensor_parallel", "no_prefix_cache", "ngram_speculation"],
)
def test_other_ways_to_run_equal_peft(name: str, way: dict[str, Any], tmp_path: Path) -> None:
    family = make_vllm_family(name, tmp_path)
    asked = questions(family, 40, longest=200)
    with Engine(family, 2**22, max_model_len=256, **way) as engine:
        for _ in range(2):
            engine.check(asked)
        assert (engine.engine.stats.prefix_cache_hits > 0) == way.get("enable_prefix_caching", True)
