"""Greedy tokens of vLLM equal PEFT's: every type in one batch, chunked, preempted, cached, and for two tenants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.engine.stats import BATCH_SIZE_BOUNDS
from tests.support.engine.harness import CONTEXT
from tests.support.vllm import make_vllm_family, needs_vllm, questions
from tests.support.vllm_engine import Engine

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

NUM_QUESTIONS, LONGEST = 48, 200
MANY, SCARCE = 400, 12  # half of it where most layers need blocks for a window alone
"""Blocks of 32 positions of all layers, for sequences of up to 8 blocks each."""


@dataclass(frozen=True)
class Case:
    """A way to run a family.

    Attributes:
        family: Its name.
        num_blocks: Blocks of 32 positions.
        settings: Of the engine.
    """

    family: str
    num_blocks: int
    settings: dict[str, Any]

    @property
    def memory(self) -> int:
        """Bytes of a rank's blocks: three layers, keys and values, two heads of 32 (GPT-2: four), float32."""
        num_ranks: int = self.settings.get("tensor_parallel_size", 1)
        num_heads = (4 if self.family == "gpt2" else 2) // num_ranks
        return self.num_blocks * 3 * 2 * 32 * num_heads * 32 * 4


CHUNKS_OF_16 = {"max_num_seqs": 16, "max_num_batched_tokens": 16}
TOGETHER = {"max_num_seqs": NUM_QUESTIONS, "max_num_batched_tokens": 8192}
UNCACHED = {"enable_prefix_caching": False}
TWO_RANKS = {"tensor_parallel_size": 2}
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
NGRAM = {"engine_args": msgspec.json.encode({"speculative_config": SPECULATION}).decode()}
CASES = {
    "llama-chunks-preempted": Case("llama", SCARCE, CHUNKS_OF_16),
    "mistral-together-uncached": Case("mistral", MANY, TOGETHER | UNCACHED),
    "gemma2-chunks-preempted": Case("gemma2", SCARCE // 2, CHUNKS_OF_16),
    "gemma3-together": Case("gemma3", MANY, TOGETHER),
    "gpt2-preempted": Case("gpt2", SCARCE, {}),
    "qwen3-speculation": Case("qwen3", MANY, NGRAM),
    "llama-two_ranks-together": Case("llama", MANY, TWO_RANKS | TOGETHER),
    "gemma3-two_ranks-chunks-preempted": Case("gemma3", SCARCE // 2, TWO_RANKS | CHUNKS_OF_16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_types_equal_peft_in_one_batch(case: Case, tmp_path: Path) -> None:
    """Three rounds of 48 requests: the same twice, which are in the prefix cache, and others of another tenant."""
    family = make_vllm_family(case.family, tmp_path)
    asked, others = (questions(family, NUM_QUESTIONS, seed, LONGEST) for seed in (0, 1))
    with Engine(family, 2**22, max_model_len=CONTEXT, kv_cache_memory=case.memory, **case.settings) as engine:
        engine.check(asked, salt="a")
        engine.check(asked, salt="a")
        engine.check(others, salt="b")
        stats = engine.engine.stats
    if case.num_blocks <= SCARCE:  # this keeps little, but blocks are given up and taken over all the time
        assert stats.num_preemptions > 0
    else:
        assert (stats.prefix_cache_hits > 0) == case.settings.get("enable_prefix_caching", True)
    if TOGETHER.items() <= case.settings.items():
        more_than_32 = BATCH_SIZE_BOUNDS.index(32) + 1
        assert sum(stats.batch_size.counts[more_than_32:]) > 0
