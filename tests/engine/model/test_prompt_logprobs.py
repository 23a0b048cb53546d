"""Logprobs of text tokens and new tokens equal those of one forward pass of PEFT."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils.generic import ModelOutput

from server.engine.llm_engine import LLMEngine
from server.engine.types import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Logprobs,
    RequestFailure,
    SamplingParams,
    TokenEvent,
)
from tests.support.engine.harness import (
    CONFIGS,
    PEFT_CONFIGS,
    Family,
    add,
    check_logprobs,
    failure_of,
    greedy,
    random_text,
    run,
    tokens,
)
from tests.support.presence import present

pytestmark = pytest.mark.slow

TOP = 3
SCORED: dict[str, Any] = {"logprobs": TOP, "prompt_logprobs": TOP}
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 24},
    "preempted": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 12, "kv_cache_memory": 160_000},
}


def gathered(outputs: list[TokenEvent]) -> list[Logprobs | None]:
    new = [entry for output in outputs for entry in output.logprobs or []]
    return [*present(outputs[0].prompt_logprobs), *new]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_peft(
    name: str, settings: str, make_family: Callable[[str], Family], make_engine: Callable[..., LLMEngine]
) -> None:
    family, rng = make_family(name), random.Random(name)
    engine = make_engine(family, **SETTINGS[settings])
    num_new, rounds = (30, 1) if settings == "preempted" else (6, 2)
    requests = {
        f"r{index}": (soft_prompt, random_text(rng, 1, 60))
        for index, soft_prompt in enumerate([*PEFT_CONFIGS, None] * rounds)
    }
    for request_id, (soft_prompt, text) in requests.items():
        for twice in ("", "again"):  # a cached prefix must not lose entries
            source = family.source(soft_prompt)
            add(engine, request_id + twice, text, greedy(num_new, **SCORED), soft_prompt=source)
    outputs = run(engine)
    for request_id, (soft_prompt, text) in requests.items():
        every = text + tokens(outputs[request_id])
        want = family.expected_logprobs(soft_prompt, every)
        for twice in ("", "again"):
            outs = outputs[request_id + twice]
            check_logprobs(gathered(outs), every, want, num_top=TOP)
            assert all(output.prompt_logprobs is None for output in outs[1:])
    assert (engine.stats.num_preemptions > 0) == (settings == "preempted")


def test_preemption_in_the_middle_of_a_text_loses_and_repeats_nothing(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, block_size=4, max_num_batched_tokens=16, max_num_seqs=4)
    text = random_text(random.Random(8), 120, 120)
    for key in ("prompt_tuning_20", "prefix_13", None):
        add(engine, "r", text, greedy(3, **SCORED), soft_prompt=llama.source(key))
        outputs = []
        for _ in range(3):
            while not engine.scheduler.running:
                outputs += engine.step()
            outputs += engine.step()
            (seq,) = engine.scheduler.running
            assert 0 < len(seq.prompt_logprobs) < len(text)
            engine.scheduler.preempt(seq)
        outputs += run(engine)["r"]
        every = text + tokens(outputs)
        check_logprobs(gathered(outputs), every, llama.expected_logprobs(key, every), num_top=TOP)


def test_a_model_that_cannot_be_scored_refuses_requests(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    engine.runner._scorer.check(lambda: torch.zeros(2, 3), ModelOutput, 1.0)  # the base model is not called
    (output,) = engine.add(GenerateRequest(request_id="r", prompt_token_ids=[1], params=greedy(1, prompt_logprobs=0)))
    assert failure_of(output) == RequestFailure(
        ErrorCode.REFUSED,
        "LlamaForCausalLM gives no logprobs of the text",
    )
    add(engine, "plain", [1], greedy(1, logprobs=0))
    assert len(present(run(engine)["plain"][0].logprobs)) == 1


def test_scoring_alone_returns_no_token(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    text = random_text(random.Random(1), 20, 20)
    add(engine, "score", text, greedy(0, **SCORED))
    (output,) = run(engine)["score"]
    assert (output.token_ids, output.finish_reason, output.logprobs) == ([], FinishReason.LENGTH, None)
    check_logprobs(output.prompt_logprobs, text, llama.expected_logprobs(None, text), num_top=TOP)
    assert engine.stats.generation_tokens == 0


def test_scoring_does_not_change_shared_blocks(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, block_size=4)
    source, text = llama.soft_prompts["prompt_tuning_8"], random_text(random.Random(2), 9, 9)
    add(engine, "before", text, greedy(6), soft_prompt=source)
    run(engine)
    (soft_prompt,) = engine.scheduler.block_manager.runs.values()
    kept = engine.runner.cache.tensor[:, :, soft_prompt.blocks].clone()
    add(engine, "score", text[::-1], greedy(2, **SCORED), soft_prompt=source)
    run(engine)
    assert torch.equal(engine.runner.cache.tensor[:, :, soft_prompt.blocks], kept)


def test_only_requests_that_ask_for_logprobs_get_them(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    text = random_text(random.Random(3), 9, 9)
    add(engine, "plain", text, greedy(3))
    add(engine, "new", text, greedy(3, logprobs=0))
    add(engine, "prompt", text, greedy(3, prompt_logprobs=1))
    outputs = run(engine)
    assert all(out.logprobs is None and out.prompt_logprobs is None for out in outputs["plain"])
    assert [entry.top for out in outputs["new"] for entry in present(out.logprobs)] == [[]] * 3
    assert outputs["new"][0].prompt_logprobs is None
    assert [len(present(entry).top) for entry in present(outputs["prompt"][0].prompt_logprobs)[1:]] == [1] * 8
    assert all(out.logprobs is None for out in outputs["prompt"])


def test_logprobs_do_not_depend_on_temperature_and_penalties(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama)
    text = random_text(random.Random(4), 9, 9)
    params = SamplingParams(
        max_tokens=8, temperature=1.7, seed=3, min_p=0.01, repetition_penalty=1.3, presence_penalty=1.0, **SCORED
    )
    add(engine, "r", text, params)
    outputs = run(engine)["r"]
    every = text + tokens(outputs)
    check_logprobs(gathered(outputs), every, llama.expected_logprobs(None, every), num_top=TOP)


def test_a_long_prefill_is_scored_in_pieces(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.model.prompt_scoring.MAX_ROWS", 7)
    engine = make_engine(llama)
    text = random_text(random.Random(5), 50, 50)
    add(engine, "a", text, greedy(1, **SCORED))
    add(engine, "b", text[::-1], greedy(1, **SCORED))
    outputs = run(engine)
    check_logprobs(outputs["a"][0].prompt_logprobs, text, llama.expected_logprobs(None, text), num_top=TOP)
    check_logprobs(
        outputs["b"][0].prompt_logprobs, text[::-1], llama.expected_logprobs(None, text[::-1]), num_top=TOP
    )


def test_min_tokens_and_penalties_are_applied(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    text = random_text(random.Random(6), 9, 9)
    first = llama.expected(None, text, 1)[0]
    add(engine, "stops", text, greedy(6, stop_token_ids=(first,)))
    add(engine, "put off", text, greedy(6, stop_token_ids=(first,), min_tokens=4))
    add(engine, "barred", text, greedy(6, logit_bias={first: -100.0}))
    outputs = run(engine)
    assert tokens(outputs["stops"]) == [first]
    assert first not in tokens(outputs["put off"])[:4]
    assert first not in tokens(outputs["barred"])
