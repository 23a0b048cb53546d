"""Greedy tokens equal PEFT's own at batch 1, whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.llm_engine import LLMEngine
from tests.support.engine.harness import (
    CONFIGS,
    PEFT_CONFIGS,
    Answered,
    Family,
    add,
    greedy,
    random_text,
    run,
    tokens,
)
from tests.support.presence import present

MAX_TOKENS = 14
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small_blocks": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 24},
    "few_blocks": {"block_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 12, "kv_cache_memory": 220_000},
    "no_prefix_cache": {"enable_prefix_caching": False},
}
"""few_blocks has room for about three of the longest sequences, so that soft prompts and prefixes are evicted."""


@pytest.fixture(scope="module")
def expected(make_family: Callable[[str], Family]) -> Callable[[str], Answered]:
    """Requests of a family with PEFT's answers: id -> (soft prompt, text, tokens)."""
    made: dict[str, Answered] = {}

    def make(name: str) -> Answered:
        if name not in made:
            family, rng = make_family(name), random.Random(name)
            requests = {}
            shared = random_text(rng, 30, 30)
            for index, soft_prompt in enumerate([*PEFT_CONFIGS, None] * 3):
                text = random_text(rng, 1, 60) if index % 3 else shared + random_text(rng, 1, 9)
                requests[f"r{index}"] = (soft_prompt, text, family.expected(soft_prompt, text, MAX_TOKENS))
            made[name] = requests
        return made[name]

    return make


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_batch_equals_peft(
    name: str,
    settings: str,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    expected: Callable[[str], Answered],
) -> None:
    family, requests = make_family(name), expected(name)
    engine = make_engine(family, **SETTINGS[settings])
    order = list(requests)
    random.Random(settings).shuffle(order)
    for request_id in order:
        soft_prompt, text, _ = requests[request_id]
        add(engine, request_id, text, greedy(MAX_TOKENS), soft_prompt=family.source(soft_prompt))
    outputs = run(engine)
    assert {key: tokens(outputs[key]) for key in requests} == {key: want for key, (_, _, want) in requests.items()}
    assert engine.stats.max_batch_distinct_prompts >= 2
    assert engine.stats.num_used_blocks == 0


def test_base_answers_are_the_same_before_and_after(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, enable_prefix_caching=False)
    text = random_text(random.Random(5), 20, 20)
    want = llama.expected(None, text, MAX_TOKENS)

    def bare(request_id: str) -> list[int]:
        add(engine, request_id, text, greedy(MAX_TOKENS))
        return tokens(run(engine)[request_id])

    assert bare("before") == want
    for key, source in llama.soft_prompts.items():
        add(engine, key, text, greedy(MAX_TOKENS), soft_prompt=source)
    mixed = run(engine)
    assert all(tokens(mixed[key]) != want for key in llama.soft_prompts)
    assert bare("after") == want


def test_cold_and_warm_soft_prompts_give_the_same(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, block_size=16)
    text = random_text(random.Random(6), 40, 40)
    for key, source in llama.soft_prompts.items():
        want = llama.expected(key, text, MAX_TOKENS)
        for attempt in ("cold", "warm", "warm_again"):
            add(engine, f"{key}-{attempt}", text, greedy(MAX_TOKENS), soft_prompt=source)
            outputs = run(engine)[f"{key}-{attempt}"]
            assert tokens(outputs) == want, (key, attempt)
            assert (present(outputs[0].num_cached_tokens) > 0) == (attempt != "cold")
    assert engine.stats.soft_prompt_loads == len(llama.soft_prompts)


def test_preempted_sequences_and_evicted_soft_prompts_give_the_same(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, **SETTINGS["few_blocks"])
    text = random_text(random.Random(7), 40, 40)
    for key, source in llama.soft_prompts.items():  # loaded first, so that all are admitted in one step
        add(engine, f"warm-{key}", text[:1], greedy(1), soft_prompt=source)
    run(engine)
    for key, source in llama.soft_prompts.items():
        add(engine, key, text, greedy(60), soft_prompt=source)
    outputs = run(engine)
    want = {key: llama.expected(key, text, 60) for key in llama.soft_prompts}
    assert {key: tokens(outputs[key]) for key in llama.soft_prompts} == want
    assert engine.stats.num_preemptions > 0
    assert engine.stats.soft_prompt_evictions > 0
