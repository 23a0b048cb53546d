"""The vocabulary head computes only the rows that choose a token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from server.engine.llm_engine import LLMEngine
from server.engine.types import ErrorCode
from tests.support.engine.classifiers import make_classifier
from tests.support.engine.harness import Family, add, failure_of, greedy, random_text, run, tokens

pytestmark = pytest.mark.slow


@contextmanager
def counting(engine: LLMEngine) -> Iterator[list[int]]:
    """Yield a list of the number of rows of each call of the vocabulary head."""
    rows: list[int] = []
    head = engine.runner.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, arguments: rows.append(arguments[0].shape[1]))
    try:
        yield rows
    finally:
        hook.remove()


def test_a_chunk_that_chooses_no_token_needs_no_head(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, max_num_batched_tokens=16, max_num_seqs=4)
    text = random_text(random.Random(0), 40, 40)
    with counting(engine) as rows:
        add(engine, "r", text, greedy(3), soft_prompt=llama.source("prompt_tuning_20"))
        outputs = run(engine)
    assert rows == [1, 1, 1]
    assert tokens(outputs["r"]) == llama.expected("prompt_tuning_20", text, 3)


def test_without_a_base_model_that_suffices_the_whole_model_runs(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=16, max_num_seqs=4)
    assert engine.runner._scorer.base_suffices
    engine.runner._scorer.base_suffices = False
    text = random_text(random.Random(0), 40, 40)
    add(engine, "r", text, greedy(3))
    assert tokens(run(engine)["r"]) == llama.expected(None, text, 3)


def test_a_base_model_that_computes_something_else_does_not_suffice(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    runner = make_engine(llama).runner
    spans, ids = [([0], 0, 4)], torch.arange(4)[None]
    output = runner.paged_model.forward_base(spans, {"input_ids": ids + 1})
    with torch.inference_mode():
        runner._scorer.check(
            lambda: runner.paged_model.forward(spans, {"input_ids": ids}, range(4)), lambda: output, 1e-3
        )
    assert runner._scorer.is_exact
    assert not runner._scorer.base_suffices


def test_scored_and_classified_texts_need_only_their_own_rows(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(llama)
    classifier = make_classifier(llama, "prompt_tuning", tmp_path)
    text = random_text(random.Random(1), 20, 20)
    with counting(engine) as rows:
        add(engine, "scored", text, greedy(0, prompt_logprobs=0, prompt_logprobs_start=18))
        add(engine, "classified", text, greedy(0, classify=True), soft_prompt=classifier.source)
        outputs = run(engine)
    assert rows == [2]
    assert outputs["classified"][0].class_logits
    with counting(engine) as rows:
        add(engine, "other", text, greedy(1), soft_prompt=llama.source("prompt_tuning_20"))
        add(engine, "classified", text[:7], greedy(0, classify=True), soft_prompt=classifier.source)
        outputs = run(engine)
    assert rows == [1]
    assert tokens(outputs["other"]) == llama.expected("prompt_tuning_20", text, 1)
    assert outputs["classified"][0].token_ids == []


def test_a_text_of_one_token_without_new_ones_runs_beside_decodes(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=16, max_num_seqs=4)
    text = random_text(random.Random(1), 15, 15)
    add(engine, "decoding", text, greedy(4))
    early = engine.step()
    add(engine, "read only", [5], greedy(0))
    add(engine, "scored", [5, *text], greedy(0, prompt_logprobs=0))  # its last chunk is a row between decodes
    outputs = run(engine)
    assert outputs["read only"][0].token_ids == outputs["scored"][0].token_ids == []
    begun = [output for output in early if output.request_id == "decoding"]
    assert tokens(begun + outputs["decoding"]) == llama.expected(None, text, 4)


def test_scores_that_are_not_finite_are_an_error(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    runner, text = engine.runner, random_text(random.Random(1), 20, 20)
    logits_of = runner._scorer._logits
    with patch.object(runner._scorer, "_logits", lambda *arguments: logits_of(*arguments) * math.nan):
        add(engine, "r", text, greedy(0, prompt_logprobs=0))
        (output,) = run(engine)["r"]
    assert failure_of(output).code is ErrorCode.NOT_FINITE
    assert engine.stats.num_used_blocks == 0
