"""Adapters on a GPU equal PEFT's, launched one by one and replayed from CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from server.engine.cuda.adapter_backend import TritonAdapters
from server.engine.llm_engine import LLMEngine
from tests.support.engine.adapters import ADAPTERS, Adapted, make_adapters
from tests.support.engine.harness import Family, add, greedy, random_text, run, tokens
from tests.support.engine.mixed_batch import make

MAX_TOKENS = 8
FAMILIES = ("llama", "qwen3", "gemma2", "opt")
REPLAYED = ("attention_4", "all_rslora", "head_and_embeddings", "bias", "dora")


@pytest.fixture(scope="module")
def adapted_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    made: dict[str, Adapted] = {}

    def of(name: str) -> Adapted:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            made[name] = make_adapters(make(name, folder), folder)
        return made[name]

    return of


Request = tuple[str | None, str | None, list[int]]
"""An adapter, a soft prompt, and a text."""


def check(engine: LLMEngine, adapted: Adapted, requests: dict[str, Request]) -> None:
    """Compare requests that run together with PEFT's answers."""
    family: Family = adapted.family
    for request_id, (kind, soft_prompt, text) in requests.items():
        adapter = None if kind is None else adapted.sources[kind]
        add(engine, request_id, text, greedy(MAX_TOKENS), soft_prompt=family.source(soft_prompt), adapter=adapter)
    outputs = run(engine)
    got = {request_id: tokens(outputs[request_id]) for request_id in requests}
    assert got == {
        request_id: adapted.expected(kind, text, MAX_TOKENS, soft_prompt)
        for request_id, (kind, soft_prompt, text) in requests.items()
    }


@pytest.mark.parametrize("is_eager", [True, False], ids=["launched", "replayed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_and_pairs_beside_bare_rows_equal_peft(
    name: str, is_eager: bool, adapted_of: Callable[[str], Adapted], make_engine: Callable[..., LLMEngine]
) -> None:
    adapted, rng = adapted_of(name), random.Random(name)
    engine = make_engine(adapted.family, device="cuda", enforce_eager=is_eager, max_num_seqs=12)
    assert engine.model.adapters_off is None
    assert isinstance(engine.runner.paged_model.adapter_backend, TritonAdapters)
    assert engine.runner.records_adapters != is_eager
    requests = {
        f"{kind} {soft_prompt}": (kind, soft_prompt, random_text(rng, 1, 60))
        for kind in (*ADAPTERS, None)
        for soft_prompt in (None, *adapted.family.soft_prompts)
    }
    check(engine, adapted, requests)
    check(engine, adapted, requests)  # from the prefix cache


def test_any_adapters_follow_each_other_over_the_same_graph(
    adapted_of: Callable[[str], Adapted], make_engine: Callable[..., LLMEngine]
) -> None:
    """Of one, two and forty adapters, and of none, in turn."""
    adapted, rng = adapted_of("llama"), random.Random(6)
    every = {
        f"copy{number}": msgspec.structs.replace(adapted.sources[kind], digest=f"copy{number}")
        for number, kind in zip(range(40), REPLAYED * 8, strict=True)
    }
    own = dict(zip(every, REPLAYED * 8, strict=True))
    text = random_text(rng, 12, 12)
    want = {kind: adapted.expected(kind, text, MAX_TOKENS) for kind in (*REPLAYED, None)}
    engine = make_engine(adapted.family, device="cuda", max_num_seqs=40, enable_prefix_caching=False)
    assert engine.runner.records_adapters
    for count in (1, 2, 40, 0, 2, 1, 40):
        names = list(every)[:count]
        for row in range(40):
            adapter = every[names[row % count]] if count else None
            add(engine, str(row), text, greedy(MAX_TOKENS), adapter=adapter)
        outputs = run(engine)
        for row in range(40):
            assert tokens(outputs[str(row)]) == want[own[names[row % count]] if count else None], (count, row)


def test_adapters_that_were_evicted_from_the_device_come_back(
    adapted_of: Callable[[str], Adapted], make_engine: Callable[..., LLMEngine]
) -> None:
    """While others decode, and use the memory of those that are gone."""
    adapted = adapted_of("llama")
    source, text = adapted.sources["all_rslora"], [5, 6, 7, 8]
    want = adapted.expected("all_rslora", text, MAX_TOKENS)
    budget = 4 * source.num_parameters * 4
    engine = make_engine(adapted.family, device="cuda", max_num_seqs=2, adapter_device_bytes=budget)
    for turn in range(3):
        for number in range(12):
            copy = msgspec.structs.replace(source, digest=f"copy{number}")
            add(engine, f"{turn}-{number}", text, greedy(MAX_TOKENS), adapter=copy)
        assert all(tokens(outputs) == want for outputs in run(engine).values())
        assert engine.stats.device_adapters.resident_bytes <= budget
    assert engine.stats.device_adapters.evictions > 12
    assert engine.stats.adapters.misses == 12
