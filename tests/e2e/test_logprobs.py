"""Scores and several choices of a whole server, read like lm-evaluation-harness and OpenAI's client read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.support.serving import BASE, adapter, serving, upload

CONTEXT = "when can you deliver the blue lamp?"
CONTINUATION = " on the 3rd of May, café 日本"


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    flags = ("--dtype", "float32", "--max-num-batched-tokens", "16", "--max-num-seqs", "16", "--block-size", "8")
    with serving(tmp_path_factory.mktemp("server"), *flags) as (client, _):
        for task in ("intent", "dates"):
            assert upload(client, task, *adapter(task)).status_code == 201
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
            yield sdk


def reference(model: str, ids: list[int]) -> torch.Tensor:
    """Log-softmax [text tokens, vocabulary]: row i is the distribution of token i + 1."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    peft = base if model == BASE else PeftModel.from_pretrained(base, SOFT_PROMPTS_DIRECTORY / model)
    with torch.no_grad():
        logits = peft(torch.tensor([ids])).logits[0, -len(ids) :]
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("model", [BASE, "intent", "dates"])
def test_loglikelihoods_for_the_evaluation_harness_equal_pefts(sdk: openai.OpenAI, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
    context, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (CONTEXT, CONTEXT + CONTINUATION))
    # The second time, blocks of the text are cached; no logprob may be missing.
    for _ in range(2):
        answer: Any = sdk.completions.create(
            model=model, prompt=[whole], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
        )
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(whole) + 1
        want = reference(model, whole)
        got = logprobs.token_logprobs[len(context) : -1]
        rows = want[len(context) - 1 : -1]
        assert got == pytest.approx(
            [row[token].item() for row, token in zip(rows, whole[len(context) :], strict=True)], abs=1e-4
        )
        top = logprobs.top_logprobs[len(context) : -1]
        is_greedy = [max(options.values()) == own for options, own in zip(top, got, strict=True)]
        assert is_greedy == [
            bool(row.argmax() == token) for row, token in zip(rows, whole[len(context) :], strict=True)
        ]
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())


def test_tokens_and_offsets_fit_the_text(sdk: openai.OpenAI) -> None:
    text = CONTEXT + CONTINUATION
    answer: Any = sdk.completions.create(model=BASE, prompt=text, max_tokens=0, logprobs=0, echo=True)
    choice = answer.choices[0]
    assert choice.text == text
    offsets = [*choice.logprobs.text_offset, len(text)]
    for token, start, stop in zip(choice.logprobs.tokens, offsets, offsets[1:], strict=False):
        assert token.startswith("bytes:") or token == text[start:stop]


def test_choices_differ_by_seed_and_are_repeatable(sdk: openai.OpenAI) -> None:
    def texts() -> list[str]:
        answer: Any = sdk.completions.create(
            model="dates", prompt=CONTEXT, max_tokens=12, n=5, seed=3, temperature=1.5
        )
        assert answer.usage.prompt_tokens < 40
        assert [choice.index for choice in answer.choices] == list(range(5))
        return [choice.text for choice in answer.choices]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first
    alone = sdk.completions.create(model="dates", prompt=CONTEXT, max_tokens=12, seed=3, temperature=1.5)
    assert alone.choices[0].text == first[0]
