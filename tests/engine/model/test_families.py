"""Every prompt-learning type of PEFT on every family of models: greedy tokens equal PEFT's own at batch 1."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.llm_engine import LLMEngine
from tests.support.engine.harness import (
    ALL_PEFT_CONFIGS,
    MORE_CONFIGS,
    Answered,
    Family,
    add,
    check_logprobs,
    check_that_the_store_takes_them,
    greedy,
    make_family,
    random_text,
    run,
    tokens,
)
from tests.support.presence import present

pytestmark = pytest.mark.slow

MAX_TOKENS = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small_blocks": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 24},
}


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Family, Answered]]:
    """A family and its requests with PEFT's answers: id -> (soft prompt, text, tokens)."""
    made: dict[str, tuple[Family, Answered]] = {}

    def make(name: str) -> tuple[Family, Answered]:
        if name not in made:
            family, rng = make_family(name, tmp_path_factory.mktemp(name), ALL_PEFT_CONFIGS), random.Random(name)
            shared = random_text(rng, 20, 20)
            requests = {}
            for index, soft_prompt in enumerate([*family.soft_prompts, None] * 2):
                text = random_text(rng, 1, 40) if index % 2 else shared + random_text(rng, 1, 5)
                requests[f"r{index}"] = (soft_prompt, text, family.expected(soft_prompt, text, MAX_TOKENS))
            made[name] = family, requests
        return made[name]

    return make


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", *MORE_CONFIGS])
def test_everything_in_one_batch_equals_peft(
    name: str,
    settings: str,
    family_of: Callable[[str], tuple[Family, Answered]],
    make_engine: Callable[..., LLMEngine],
) -> None:
    family, requests = family_of(name)
    engine = make_engine(family, **SETTINGS[settings])
    check_that_the_store_takes_them(family, engine.model)
    for source in family.soft_prompts.values():  # loaded first, so that all are in one batch
        add(engine, f"warm-{source.identity}", [1], greedy(1), soft_prompt=source)
    run(engine)
    order = list(requests)
    random.Random(settings).shuffle(order)
    for request_id in order:
        soft_prompt, text, _ = requests[request_id]
        add(engine, request_id, text, greedy(MAX_TOKENS), soft_prompt=family.source(soft_prompt))
    outputs = run(engine)
    assert {key: tokens(outputs[key]) for key in requests} == {key: want for key, (_, _, want) in requests.items()}
    if settings == "defaults":
        assert engine.stats.max_batch_distinct_prompts == len(family.soft_prompts)
    assert engine.stats.num_used_blocks == 0


@pytest.mark.parametrize("name", ["llama", *MORE_CONFIGS])
def test_logprobs_of_texts_equal_peft(
    name: str,
    family_of: Callable[[str], tuple[Family, Answered]],
    make_engine: Callable[..., LLMEngine],
) -> None:
    family, _ = family_of(name)
    engine = make_engine(family, **SETTINGS["small_blocks"])
    text = random_text(random.Random(name), 30, 30)
    for key in [*family.soft_prompts, None]:
        params = greedy(1, logprobs=2, prompt_logprobs=2)
        add(engine, str(key), text, params, soft_prompt=family.source(key))
    outputs = run(engine)
    for key in [*family.soft_prompts, None]:
        (output,) = outputs[str(key)]
        every = text + output.token_ids
        want = family.expected_logprobs(key, every)
        check_logprobs([*present(output.prompt_logprobs), *present(output.logprobs)], every, want, num_top=2)


@pytest.mark.parametrize("name", ["llama", *MORE_CONFIGS])
def test_every_soft_prompt_changes_the_answer(name: str, family_of: Callable[[str], tuple[Family, Answered]]) -> None:
    family, _ = family_of(name)
    text = random_text(random.Random(3), 12, 12)
    answers = [family.expected(soft_prompt, text, MAX_TOKENS) for soft_prompt in [*family.soft_prompts, None]]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_softcapped_attention_is_served_in_bfloat16(
    family_of: Callable[[str], tuple[Family, Answered]], make_engine: Callable[..., LLMEngine]
) -> None:
    family, _ = family_of("gemma2")
    engine = make_engine(family, dtype="bfloat16")  # the startup check compares the logits
    for key, source in family.soft_prompts.items():
        add(engine, key, [1, 2, 3], greedy(5), soft_prompt=source)
    assert {key: len(tokens(output)) for key, output in run(engine).items()} == dict.fromkeys(family.soft_prompts, 5)
