"""Soft prompts for which the model computes NaN fail their own requests, and no block that they leave is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.engine.llm_engine import NOT_FINITE_SOFT_PROMPT, LLMEngine
from server.engine.model.platform import CPUPlatform, Platform
from server.engine.sampling.next_token import NOT_FINITE_TEXT
from server.engine.types import ErrorCode, RequestFailure, SamplingParams, SoftPromptSource, TokenEvent
from tests.support.engine.harness import VOCABULARY, Family, add, failure_of, greedy, random_text, run, tokens
from tests.support.engine.platforms import PlainPlatform

pytestmark = pytest.mark.slow

RNG = random.Random(8)
NAN_TOKEN = VOCABULARY - 1
"""A token whose embedding the tests make NaN: texts that hold it are poison from there on."""


def healthy_text(length: int) -> list[int]:
    return [token % NAN_TOKEN for token in random_text(RNG, length, length)]


TEXT = healthy_text(24)
SHAPES = {"llama": (48, 2 * 3 * 2 * 12), "gpt2": (48, 2 * 3 * 4 * 12)}
"""Width of rows of embeddings, and of keys and values."""


def rows_file(path: Path, rows: torch.Tensor, *, is_key_values: bool = False) -> SoftPromptSource:
    save_file({"prompt_embeddings": rows}, path)
    return SoftPromptSource(
        digest=path.stem, num_virtual_tokens=len(rows), is_key_values=is_key_values, path=str(path)
    )


@pytest.fixture(params=["compiled", "torch"])
def platform(request: pytest.FixtureRequest) -> Platform:
    return PlainPlatform() if request.param == "torch" else CPUPlatform()


def poison_a_token(engine: LLMEngine) -> None:
    model: Any = engine.runner.model
    model.get_input_embeddings().weight.data[NAN_TOKEN] = torch.nan


def end(outputs: list[TokenEvent]) -> RequestFailure:
    return failure_of(outputs[-1])


def check_what_is_left(engine: LLMEngine) -> None:
    """Everything that the next sequence may find is finite, and nothing else is kept."""
    blocks, cache = engine.scheduler.block_manager, engine.runner.cache
    assert engine.stats.num_used_blocks == 0
    if blocks.findable:
        assert cache.are_finite(list(blocks.findable)).all()
    for own in blocks.runs.values():
        assert own.is_filled
        assert cache.are_finite(own.blocks).flatten()[: own.num_computed].all()


@pytest.mark.parametrize("num_rows", [6, 16, 37])
@pytest.mark.parametrize("max_num_batched_tokens", [2048, 17])
def test_embeddings_that_overflow_end_their_requests_and_leave_nothing(
    num_rows: int,
    max_num_batched_tokens: int,
    make_family: Callable[[str], Family],
    make_engine: Callable[..., LLMEngine],
    tmp_path: Path,
) -> None:
    gpt2 = make_family("gpt2")  # whose norms take a mean, which overflows
    engine = make_engine(gpt2, block_size=4, max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens)
    rows = torch.randn(num_rows, SHAPES["gpt2"][0])
    rows[num_rows // 2 :] = 3e38
    poison = rows_file(tmp_path / "poison.safetensors", rows)
    healthy = gpt2.soft_prompts["prompt_tuning_20"]
    for turn in range(2):
        for index in range(3):
            add(engine, f"bad{index}", TEXT, greedy(5), soft_prompt=poison)
            add(engine, f"good{index}", TEXT, greedy(5), soft_prompt=healthy)
        add(engine, "ensemble", TEXT, greedy(5), soft_prompt=healthy, others=[None, poison])
        outputs = run(engine)
        for name in ("bad0", "bad1", "bad2", "ensemble"):
            assert end(outputs[name]) == RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_SOFT_PROMPT), turn
            assert tokens(outputs[name]) == []
        want = gpt2.expected("prompt_tuning_20", TEXT, 5)
        assert [tokens(outputs[f"good{index}"]) for index in range(3)] == [want] * 3
        assert list(engine.scheduler.block_manager.runs) == [healthy.identity]
        check_what_is_left(engine)


@pytest.mark.parametrize("max_num_batched_tokens", [2048, 20])
@pytest.mark.parametrize("place", [0, 23, 24, 50, 69])
def test_a_text_that_is_not_finite_ends_with_those_that_follow_it(
    place: int,
    max_num_batched_tokens: int,
    platform: Platform,
    llama: Family,
    make_engine: Callable[..., LLMEngine],
) -> None:
    engine = make_engine(llama, platform, block_size=4, max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens)
    poison_a_token(engine)
    text = healthy_text(70)
    text[place] = NAN_TOKEN
    for name in ("first", "again", "once more"):
        add(engine, name, text, greedy(5))
    add(engine, "longer", text + TEXT, greedy(5))
    opening = text[:place] or TEXT
    add(engine, "opening", opening, greedy(5))
    outputs = run(engine)
    for name in ("first", "again", "once more", "longer"):
        assert end(outputs[name]) == RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
        assert tokens(outputs[name]) == []
    want = llama.expected(None, opening, 5)
    if NAN_TOKEN in want:
        want = want[: want.index(NAN_TOKEN) + 1]
    assert tokens(outputs["opening"]) == want
    check_what_is_left(engine)
    add(engine, "later", text, greedy(5))
    outputs = run(engine)
    assert end(outputs["later"]) == RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)


def test_blocks_that_poison_has_filled_are_as_good_as_new(
    platform: Platform, llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(llama, platform, block_size=16, kv_cache_memory=200_000, max_num_seqs=4)
    asks = [(None, healthy_text(100)), ("prefix_13", healthy_text(60)), ("p_tuning_7", healthy_text(33))]
    want = [llama.expected(name, text, 6) for name, text in asks]
    width = SHAPES["llama"][1]
    for turn, value in enumerate((3e38, -3e38, 1e30)):
        poison = rows_file(tmp_path / f"{turn}.safetensors", torch.full((200, width), value), is_key_values=True)
        add(engine, "evil", TEXT, greedy(2), soft_prompt=poison)
        run(engine)
        for index, (name, text) in enumerate(asks):
            add(engine, f"r{index}", text, greedy(6), soft_prompt=llama.soft_prompts[name] if name else None)
        outputs = run(engine)
        assert [tokens(outputs[f"r{index}"]) for index in range(len(asks))] == want
    engine.runner.cache.tensor.fill_(torch.nan)
    engine.scheduler = engine._make_scheduler()
    for index, (name, text) in enumerate(asks):
        add(engine, f"r{index}", text, greedy(6), soft_prompt=llama.soft_prompts[name] if name else None)
    outputs = run(engine)
    assert [tokens(outputs[f"r{index}"]) for index in range(len(asks))] == want


def test_a_partial_block_is_copied_with_whatever_is_behind_the_soft_prompt(
    platform: Platform, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, platform, block_size=16)
    engine.runner.cache.tensor.fill_(torch.nan)
    for name in ("prompt_tuning_20", "prefix_13", "p_tuning_7"):
        for turn in range(2):
            add(engine, name, TEXT[turn:], greedy(6), soft_prompt=llama.soft_prompts[name])
            assert tokens(run(engine)[name]) == llama.expected(name, TEXT[turn:], 6)
    check_what_is_left(engine)


def test_rows_that_are_not_finite_in_the_serving_dtype_are_not_loaded(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    engine = make_engine(llama, dtype="float16")
    rows = torch.randn(4, SHAPES["llama"][0])
    rows[2, 7] = 7e4
    add(engine, "bad", TEXT, greedy(5), soft_prompt=rows_file(tmp_path / "large.safetensors", rows))
    assert end(run(engine)["bad"]) == RequestFailure(
        ErrorCode.FAILED,
        "soft prompt large holds a value that is not finite in float16",
    )


def test_a_text_that_is_not_finite_keeps_what_was_finite_of_it(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, block_size=4, max_num_batched_tokens=17, max_num_seqs=4)
    poison_a_token(engine)
    add(engine, "bad", [*TEXT, NAN_TOKEN], greedy(5))
    assert end(run(engine)["bad"]) == RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
    add(engine, "good", TEXT, greedy(5))
    outputs = run(engine)["good"]
    assert tokens(outputs) == llama.expected(None, TEXT, 5)
    assert outputs[0].num_cached_tokens == 16


SCORED = {"seed": 5, "top_p": 0.9, "logprobs": 2, "prompt_logprobs": 1, "prompt_logprobs_start": 21}


@pytest.mark.parametrize("params", [{"seed": 5}, SCORED])
def test_who_was_misled_is_computed_again_with_the_same_random_numbers(
    params: dict[str, Any], platform: Platform, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, platform, block_size=4)
    add(engine, "alone", TEXT, SamplingParams(max_tokens=6, **params))
    alone = run(engine)["alone"]
    engine = make_engine(llama, platform, block_size=4)
    poison_a_token(engine)
    add(engine, "bad", [*TEXT, NAN_TOKEN], greedy(5))
    add(engine, "misled", TEXT, SamplingParams(max_tokens=6, **params))
    outputs = run(engine)
    assert end(outputs["bad"]) == RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
    assert engine.stats.num_preemptions == 1
    assert tokens(outputs["misled"]) == tokens(alone)
    assert outputs["misled"][0].prompt_logprobs == alone[0].prompt_logprobs
    check_what_is_left(engine)
