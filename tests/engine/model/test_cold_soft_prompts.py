"""Texts start in the step that fills their soft prompt, and get the same tokens and logits as behind a filled one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from server.engine.llm_engine import NOT_FINITE_SOFT_PROMPT, LLMEngine
from server.engine.messages import Pin
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.scheduling.plan import StepPlan
from server.engine.types import ErrorCode, FinishReason, RequestFailure, SoftPromptSource, StepOutput
from tests.support.engine.classifiers import make_classifier
from tests.support.engine.harness import (
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

RNG = random.Random(12)
TEXTS = [random_text(RNG, 30, 30), random_text(RNG, 1, 1), random_text(RNG, 12, 12), random_text(RNG, 41, 41)]
COLD = ("prompt_tuning_20", "prompt_tuning_8", "p_tuning_7")
"""Soft prompts of embeddings: of a block of 16 and four virtual tokens, and of less than a block."""


def load(engine: LLMEngine, *sources: SoftPromptSource) -> None:
    """Read soft prompts into host memory, so that no sequence waits for a file; the key/value blocks stay empty."""
    for source in sources:
        engine.pin(Pin(source))
    while engine.soft_prompts.stats.resident < len(sources):
        engine.take_loaded()
        time.sleep(0.001)


def watch(engine: LLMEngine) -> list[StepPlan]:
    """A list that receives the plan of each step."""
    plans: list[StepPlan] = []
    launch = engine.runner.launch

    def launch_and_keep(plan: StepPlan, soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        plans.append(plan)
        return launch(plan, soft_prompts)

    engine.runner.launch = launch_and_keep  # type: ignore[method-assign]
    return plans


@pytest.mark.parametrize("block_size", [16, 4, 5, 64])
@pytest.mark.parametrize("key", COLD)
def test_a_cold_soft_prompt_costs_no_step(
    key: str, block_size: int, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, block_size=block_size, enable_prefix_caching=False)
    source, text = llama.soft_prompts[key], TEXTS[0]
    load(engine, source)
    plans = watch(engine)
    want = llama.expected(key, text, 8)
    num_virtual = source.num_virtual_tokens
    for attempt, start in (("cold", num_virtual // block_size * block_size), ("warm", num_virtual)):
        plans.clear()
        add(engine, attempt, text, greedy(8), soft_prompt=source)
        (event,) = engine.step()
        assert event.token_ids == want[:1]
        assert [chunk.start for chunk in plans[0].chunks if chunk.seq] == [start]
        assert bool(plans[0].block_copies) == (attempt == "warm" and num_virtual % block_size > 0)
        assert [*event.token_ids, *tokens(run(engine)[attempt])] == want
        assert len(plans) == 8
    assert engine.stats.soft_prompt_loads == 1


def test_a_cold_soft_prompt_of_keys_and_values_is_still_copied(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama)
    source, text = llama.soft_prompts["prefix_13"], TEXTS[0]
    load(engine, source)
    plans = watch(engine)
    add(engine, "r", text, greedy(4), soft_prompt=source)
    assert tokens(run(engine)["r"]) == llama.expected("prefix_13", text, 4)
    assert [(chunk.start, chunk.num_virtual_tokens) for chunk in plans[0].chunks] == [(13, 0)]
    assert len(plans[0].block_copies) == 1


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_all_that_wait_start_at_once(
    name: str,
    enable_prefix_caching: bool,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
) -> None:
    family = make_family(name)
    engine = make_engine(family, enable_prefix_caching=enable_prefix_caching)
    load(engine, *(family.soft_prompts[key] for key in COLD))
    asked = {f"{key}-{number}": (key, text) for key in COLD for number, text in enumerate([*TEXTS, TEXTS[0]])}
    asked |= {"bare": ("", TEXTS[3])}
    add(engine, "decoding", TEXTS[2], greedy(8))
    first = engine.step()
    for request_id, (key, text) in asked.items():
        add(engine, request_id, text, greedy(6), soft_prompt=family.source(key or None))
    second = engine.step()
    assert {event.request_id for event in second} == {"decoding", *asked}
    outputs = run(engine)
    for event in reversed(first + second):
        outputs[event.request_id].insert(0, event)
    for request_id, (key, text) in asked.items():
        assert tokens(outputs[request_id]) == family.expected(key or None, text, 6), request_id
        shares = enable_prefix_caching and request_id.endswith("-4")
        assert (present(outputs[request_id][0].num_cached_tokens) > 0) == shares
    assert tokens(outputs["decoding"]) == family.expected(None, TEXTS[2], 8)


@pytest.mark.parametrize("budget", [*range(17, 27), 30, 50, 53, 54, 55])
def test_no_budget_changes_the_tokens(budget: int, llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, max_num_batched_tokens=budget, max_num_seqs=4)
    source = llama.soft_prompts["prompt_tuning_20"]
    load(engine, source)
    plans = watch(engine)
    for number, text in enumerate(TEXTS):
        add(engine, str(number), text, greedy(5), soft_prompt=source)
    outputs = run(engine)
    for number, text in enumerate(TEXTS):
        assert tokens(outputs[str(number)]) == llama.expected("prompt_tuning_20", text, 5)
    fill = next(plan for plan in plans if any(chunk.run and chunk.stop == 20 for chunk in plan.chunks))
    # Of the step that completes the run, 20 positions (or the last 20 - budget) are the run's, four repeat.
    left = budget - (20 if budget >= 20 else 20 - budget)
    assert any(chunk.seq for chunk in fill.chunks) == (left > 4)


def test_members_of_an_ensemble_start_with_their_cold_soft_prompts(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, enable_prefix_caching=False)
    keys = ["prefix_13", *COLD]
    sources = [llama.soft_prompts[key] for key in keys]
    load(engine, *sources)
    text = TEXTS[0]
    dists = torch.stack([llama.expected_logprobs(key, [*text, 0])[-1] for key in keys])
    want = int(dists.exp().mean(0).argmax())
    answers = []
    for attempt in ("cold", "warm"):
        add(engine, attempt, text, greedy(8), soft_prompt=sources[0], others=(*sources[1:], None, sources[1]))
        (event,) = engine.step()
        answers.append([*event.token_ids, *tokens(run(engine)[attempt])])
    assert answers[0] == answers[1]
    add(engine, "four", text, greedy(1), soft_prompt=sources[0], others=tuple(sources[1:]))
    assert tokens(run(engine)["four"]) == [want]


@pytest.mark.parametrize("budget", [28, 29, 30, 34, 40, 60])
def test_members_that_the_budget_cuts_give_the_same(
    budget: int, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    sources = [llama.soft_prompts[key] for key in ("p_tuning_7", "prompt_tuning_20")]
    answers = []
    for settings in ({}, {"max_num_batched_tokens": budget, "max_num_seqs": 4, "block_size": 8}):
        engine = make_engine(llama, **settings)
        load(engine, *sources)
        add(engine, "e", TEXTS[2], greedy(8), soft_prompt=sources[0], others=(sources[1],))
        answers.append(tokens(run(engine)["e"]))
    assert len(answers[0]) == 8
    assert answers[1] == answers[0]


@pytest.mark.parametrize("budget", [2048, 17, 21, 24, 26])
@pytest.mark.parametrize("key", COLD)
def test_logprobs_of_a_text_behind_a_cold_soft_prompt_equal_peft(
    key: str, budget: int, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=budget, max_num_seqs=4)
    source = llama.soft_prompts[key]
    load(engine, source)
    for start in (0, 1, 5):
        engine.scheduler = engine._make_scheduler()  # empties the key/value blocks
        for number, text in enumerate(TEXTS):
            params = greedy(2, prompt_logprobs=3, prompt_logprobs_start=min(start, len(text)))
            add(engine, str(number), text, params, soft_prompt=source)
        outputs = run(engine)
        for number, text in enumerate(TEXTS):
            own = outputs[str(number)]
            assert tokens(own) == llama.expected(key, text, 2)
            want = llama.expected_logprobs(key, text)[start:]
            check_logprobs(own[0].prompt_logprobs, text[start:], want, num_top=3)


def test_the_first_logprob_behind_a_cold_soft_prompt_needs_no_second_pass(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama)
    source = llama.soft_prompts["prompt_tuning_20"]
    load(engine, source)
    passes = Mock(side_effect=engine.runner.backend.begin)
    monkeypatch.setattr(engine.runner.backend, "begin", passes)
    for attempt, num_passes in (("cold", 1), ("warm", 2), ("warm again", 1)):
        passes.reset_mock()
        add(engine, attempt, TEXTS[0], greedy(0, prompt_logprobs=3), soft_prompt=source)
        (event,) = engine.step()
        want = llama.expected_logprobs("prompt_tuning_20", TEXTS[0])
        check_logprobs(event.prompt_logprobs, TEXTS[0], want, num_top=3)
        assert passes.call_count == num_passes


@pytest.mark.parametrize("budget", [2048, 26])
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "multitask"])
def test_a_cold_classifier_answers_in_one_step(
    kind: str, budget: int, llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=budget, max_num_seqs=4)
    classifier = make_classifier(llama, kind, tmp_path)
    load(engine, classifier.source)
    for number, text in enumerate(TEXTS):
        add(engine, str(number), text, greedy(0, classify=True), soft_prompt=classifier.source)
    outputs = run(engine)
    for number, text in enumerate(TEXTS):
        (event,) = outputs[str(number)]
        assert event.finish_reason is FinishReason.LENGTH
        assert event.class_logits == pytest.approx(classifier.expected(text), abs=1e-4)
    assert (engine.stats.steps == 1) == (budget == 2048)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("budget", [2048, 25])
def test_preemption_after_a_cold_start_copies_the_partial_block(
    num_steps: int, budget: int, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=budget, max_num_seqs=4, enable_prefix_caching=False)
    source, text = llama.soft_prompts["prompt_tuning_20"], TEXTS[0]
    load(engine, source)
    plans = watch(engine)
    for name in ("scored", "plain"):
        add(engine, name, text, greedy(6, prompt_logprobs=2 if name == "scored" else None), soft_prompt=source)
    early = [event for _ in range(num_steps) for event in engine.step()]
    started = list(engine.scheduler.running)
    assert started
    for seq in reversed(started):
        engine.scheduler.preempt(seq)
        engine.scheduler.check_integrity()
    plans.clear()
    outputs = run(engine)
    assert len(plans[0].block_copies) >= 1
    assert not any(chunk.num_virtual_tokens for plan in plans for chunk in plan.chunks)
    for name in ("scored", "plain"):
        own = [event for event in early if event.request_id == name] + outputs[name]
        assert tokens(own) == llama.expected("prompt_tuning_20", text, 6)
        if name == "scored":
            want = llama.expected_logprobs("prompt_tuning_20", text)
            check_logprobs(own[0].prompt_logprobs, text, want, num_top=2)


@pytest.mark.parametrize("num_rows", [6, 16, 20, 37])
@pytest.mark.parametrize("is_first_bad", [True, False])
def test_rows_that_are_not_finite_end_what_starts_beside_them(
    num_rows: int,
    is_first_bad: bool,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    tmp_path: Path,
) -> None:
    gpt2 = make_family("gpt2")  # whose norms take a mean, which overflows
    engine = make_engine(gpt2)
    rows = torch.randn(num_rows, 48)
    rows[0 if is_first_bad else -1] = 3e38
    save_file({"prompt_embeddings": rows}, tmp_path / "bad.safetensors")
    bad = SoftPromptSource(
        digest="bad", num_virtual_tokens=num_rows, is_key_values=False, path=str(tmp_path / "bad.safetensors")
    )
    healthy = gpt2.soft_prompts["prompt_tuning_20"]
    load(engine, bad, healthy)
    for number in range(2):
        add(engine, f"good{number}", TEXTS[0], greedy(5), soft_prompt=healthy)
        add(engine, f"bad{number}", TEXTS[0], greedy(5), soft_prompt=bad)
    add(engine, "ensemble", TEXTS[0], greedy(5), soft_prompt=healthy, others=(bad,))
    ended = {event.request_id: event for event in engine.step()}
    for name in ("bad0", "bad1", "ensemble"):
        assert failure_of(ended[name]) == RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_SOFT_PROMPT)
    engine.scheduler.check_integrity()
    blocks, cache = engine.scheduler.block_manager, engine.runner.cache
    assert list(blocks.runs) == [healthy.identity]
    assert cache.are_finite(list(blocks.findable)).all()
    outputs = run(engine)
    want = gpt2.expected("prompt_tuning_20", TEXTS[0], 5)
    for number in range(2):
        assert [*ended[f"good{number}"].token_ids, *tokens(outputs[f"good{number}"])] == want


def test_bfloat16_starts_beside_the_fill(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, dtype="bfloat16")
    sources = [llama.soft_prompts[key] for key in COLD]
    load(engine, *sources)
    for source in sources:
        add(engine, source.digest, TEXTS[0], greedy(4, logprobs=3), soft_prompt=source)
    first = {event.request_id: event for event in engine.step()}
    run(engine)
    for source in sources:
        add(engine, source.digest, TEXTS[0], greedy(1, logprobs=3), soft_prompt=source)
    warm: dict[str, Any] = {event.request_id: event for event in engine.step()}
    for source in sources:
        (cold,), (again,) = present(first[source.digest].logprobs), warm[source.digest].logprobs
        assert [value for _, value in cold.top] == pytest.approx([value for _, value in again.top], abs=0.2)
