"""Scored labels and classification heads equal PEFT's, whatever else is in the batch."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.generic import ModelOutput

from server.engine.llm_engine import LLMEngine
from server.engine.types import ErrorCode, FinishReason, GenerateRequest
from tests.support.engine.classifiers import CLASSIFIERS, NUM_LABELS, make_classifier
from tests.support.engine.harness import (
    VOCABULARY,
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

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 24},
    "preempted": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 12, "kv_cache_memory": 160_000}
    | {"max_model_len": 128},
    "uncached": {"enable_prefix_caching": False},
}
SCORE = {"prompt_logprobs": 0}


def generate_beside(
    engine: LLMEngine, family: Family, rng: random.Random, count: int
) -> dict[str, tuple[str | None, list[int]]]:
    """Sequences that decode while others are classified."""
    beside = {}
    for index in range(count):
        key = rng.choice([*family.soft_prompts, None])
        text = random_text(rng, 1, 40)
        add(engine, f"beside-{index}", text, greedy(30), soft_prompt=family.source(key))
        beside[f"beside-{index}"] = (key, text)
    return beside


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scored_labels_equal_peft(
    name: str, settings: str, make_family: Callable[[str], Family], make_engine: Callable[..., LLMEngine]
) -> None:
    family, rng = make_family(name), random.Random(name)
    engine = make_engine(family, **SETTINGS[settings])
    beside = generate_beside(engine, family, rng, 10)
    early = [output for _ in range(3) for output in engine.step()]
    labels = [[5], [7, 3], [7, 3, 99, 1]]
    texts: dict[str, tuple[str | None, list[int], list[int]]] = {}
    for key in ("prompt_tuning_20", "prompt_tuning_8", "prefix_13", "prefix_projected_16", None):
        for length in (1, 15, 40):
            text = random_text(rng, length, length)
            for label in labels:
                request_id = f"{key}-{length}-{label}"
                texts[request_id] = (key, text, label)
                params = greedy(0, **SCORE, prompt_logprobs_start=length)
                add(engine, request_id, text + label, params, soft_prompt=family.source(key))
    outputs = run(engine)
    for request_id, (key, text, label) in texts.items():
        (output,) = outputs[request_id]
        want = family.expected_logprobs(key, text + label)[len(text) :]
        got = [present(entry).logprob for entry in present(output.prompt_logprobs)]
        assert got == pytest.approx([want[index, token].item() for index, token in enumerate(label)], abs=1e-4)
    for request_id, (key, text) in beside.items():
        begun = [output for output in early if output.request_id == request_id]
        assert tokens(begun + outputs[request_id]) == family.expected(key, text, 30)
    assert (engine.stats.num_preemptions > 0) == (settings == "preempted")


@pytest.mark.parametrize("length", [31, 32, 33, 48])
@pytest.mark.parametrize("key", ["prompt_tuning_20", "prefix_projected_16", None])
def test_the_text_of_all_labels_is_computed_once(
    key: str | None, length: int, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, block_size=16)
    text, source = random_text(random.Random(length), length, length), llama.source(key)
    for label in range(4):
        params = greedy(0, **SCORE, prompt_logprobs_start=length)
        add(engine, str(label), [*text, label, label], params, soft_prompt=source)
    outputs = run(engine)
    num_virtual = source.num_virtual_tokens if source else 0
    # The logits at the text's last position are needed, so a full block that ends with it is computed again.
    most = (num_virtual + length - 1) // 16 * 16 - num_virtual
    assert [outputs[str(label)][0].num_cached_tokens for label in range(4)] == [0, most, most, most]


def test_a_start_after_the_first_token_needs_nothing_before_it(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, block_size=4)
    text = random_text(random.Random(3), 21, 21)
    add(engine, "first", text, greedy(0))
    run(engine)
    for start in range(len(text)):
        add(engine, f"from {start}", text, greedy(0, prompt_logprobs=3, prompt_logprobs_start=start))
    outputs = run(engine)
    want = llama.expected_logprobs(None, text)
    for start in range(len(text)):
        (output,) = outputs[f"from {start}"]
        check_logprobs(output.prompt_logprobs, text[start:], want[start:], num_top=3)
        assert output.num_cached_tokens == max(start - 1, 0) // 4 * 4


@dataclass
class Asked:
    """A text to classify."""

    key: str
    text: list[int]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_equal_peft(
    name: str,
    settings: str,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    tmp_path: Path,
) -> None:
    family, rng = make_family(name), random.Random(name)
    classifiers = {key: make_classifier(family, key, tmp_path / key) for key in CLASSIFIERS}
    engine = make_engine(family, **SETTINGS[settings])
    beside = generate_beside(engine, family, rng, 10)
    early = [output for _ in range(3) for output in engine.step()]
    asked: dict[str, Asked] = {}
    for index in range(24):
        key = rng.choice([*classifiers])
        text = random_text(rng, 1, 60)
        for twice in ("", "again"):  # with a cached prefix, only the last position is computed
            request_id = f"{index}{twice}"
            asked[request_id] = Asked(key, text)
            add(engine, request_id, text, greedy(0, classify=True), soft_prompt=classifiers[key].source)
    outputs = run(engine)
    for request_id, one in asked.items():
        (output,) = outputs[request_id]
        assert (output.finish_reason, output.token_ids) == (FinishReason.LENGTH, [])
        assert output.class_logits == pytest.approx(classifiers[one.key].expected(one.text), abs=1e-4)
    for request_id, (soft_prompt, text) in beside.items():
        begun = [output for output in early if output.request_id == request_id]
        assert tokens(begun + outputs[request_id]) == family.expected(soft_prompt, text, 30)
        assert all(output.class_logits is None for output in outputs[request_id])
    assert (engine.stats.num_preemptions > 0) == (settings == "preempted")


def test_a_head_is_counted_in_memory_and_evicted_with_its_rows(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    classifier = make_classifier(llama, "prompt_tuning", tmp_path)
    engine = make_engine(llama, soft_prompt_host_bytes=0)
    add(engine, "r", [1, 2], greedy(0, classify=True), soft_prompt=classifier.source)
    while not engine.scheduler.has_work:
        engine.take_loaded()
    width = engine.model.hidden_size
    assert engine.soft_prompts.stats.resident_bytes == (9 + NUM_LABELS) * present(width) * 4
    run(engine)
    assert engine.soft_prompts.stats.resident_bytes == 0


def test_a_model_that_cannot_classify_refuses_requests(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(llama)
    classifier = make_classifier(llama, "prompt_tuning", tmp_path)
    for source in (None, llama.soft_prompts["prefix_13"]):
        request = GenerateRequest(
            request_id="r", prompt_token_ids=[1], params=greedy(0, classify=True), soft_prompt=source
        )
        (output,) = engine.add(request)
        assert failure_of(output).message == "only a soft prompt or an adapter with a classification head classifies"
    engine.runner._scorer.check(lambda: torch.zeros(2, 3), ModelOutput, 1.0)  # the base model is not called
    request = GenerateRequest(
        request_id="r", prompt_token_ids=[1], params=greedy(0, classify=True), soft_prompt=classifier.source
    )
    (output,) = engine.add(request)
    assert failure_of(output).message == "LlamaForCausalLM gives no hidden states to classify by"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("base_model.score.weight"), "shape None"),
        (lambda tensors: tensors.update({"base_model.score.weight": torch.zeros(2, 48)}), r"\(2, 48\)"),
        (lambda tensors: tensors.update({"base_model.score.bias": torch.zeros(2)}), r"bias has shape \(2,\)"),
    ],
    ids=["missing", "another shape", "another bias"],
)
def test_a_head_that_differs_from_its_record_fails_its_requests(
    change: Callable[[dict[str, torch.Tensor]], object],
    reason: str,
    llama: Family,
    make_engine: Callable[..., LLMEngine],
    tmp_path: Path,
) -> None:
    classifier = make_classifier(llama, "prompt_tuning", tmp_path)
    tensors = load_file(classifier.source.path)
    change(tensors)
    save_file(tensors, classifier.source.path)
    engine = make_engine(llama)
    add(engine, "r", [1], greedy(0, classify=True), soft_prompt=classifier.source)
    (output,) = run(engine)["r"]
    assert failure_of(output).code is ErrorCode.FAILED
    assert re.search(reason, failure_of(output).message)


def test_logits_that_are_not_finite_are_an_error(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    classifier = make_classifier(llama, "prompt_tuning", tmp_path)
    tensors = load_file(classifier.source.path)
    tensors["base_model.score.weight"].fill_(3e38)
    save_file(tensors, classifier.source.path)
    engine = make_engine(llama)
    add(engine, "r", [VOCABULARY - 1], greedy(0, classify=True), soft_prompt=classifier.source)
    (output,) = run(engine)["r"]
    assert failure_of(output).message == "the model computed a value that is not finite for this text"


def test_a_bias_is_added(llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path) -> None:
    classifier = make_classifier(llama, "prompt_tuning", tmp_path)
    tensors = load_file(classifier.source.path)
    tensors["base_model.score.bias"] = torch.tensor([1.0, 2.0, 3.0])
    save_file(tensors, classifier.source.path)
    engine = make_engine(llama)
    add(engine, "r", [4, 5, 6], greedy(0, classify=True), soft_prompt=classifier.source)
    want = [logit + index + 1 for index, logit in enumerate(classifier.expected([4, 5, 6]))]
    assert run(engine)["r"][0].class_logits == pytest.approx(want, abs=1e-4)
