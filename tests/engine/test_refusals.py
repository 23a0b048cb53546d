"""What the engine refuses by itself, whoever has looked before: it trusts no caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.engine.llm_engine import LLMEngine
from server.engine.types import ErrorCode, GenerateRequest, Member, SamplingParams
from tests.support.engine.harness import VOCABULARY, Family, add, failure_of, greedy, run, tokens

TEXT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    ("request_fields", "params", "message"),
    [
        (
            {"prompt_token_ids": [1, VOCABULARY]},
            {},
            f"token id {VOCABULARY} is not in the vocabulary of {VOCABULARY}",
        ),
        ({"prompt_token_ids": [-1]}, {}, "token id -1 is not"),
        ({"prompt_token_ids": [2**62]}, {"prompt_logprobs": 1}, f"token id {2**62} is not"),
        ({"prompt_token_ids": []}, {}, "at least one text token"),
        ({"priority": 101}, {}, "priority 101 is not in -100..100"),
        ({}, {"logit_bias": {VOCABULARY: 1.0}}, f"token id {VOCABULARY} is not"),
        ({}, {"logit_bias": {-1: 1.0}}, "token id -1 is not"),
        ({}, {"stop_token_ids": (4, VOCABULARY)}, f"token id {VOCABULARY} is not"),
        ({}, {"stop_token_ids": (-2,)}, "token id -2 is not"),
        ({}, {"prompt_logprobs": 0, "prompt_logprobs_start": -1}, "prompt_logprobs_start -1"),
        ({"others": (Member(),)}, {"logit_bias": {VOCABULARY: 1.0}}, f"token id {VOCABULARY} is not"),
    ],
)
def test_a_request_that_would_fail_a_step_is_refused_alone(
    request_fields: dict[str, Any],
    params: dict[str, Any],
    message: str,
    llama: Family,
    make_engine: Callable[..., LLMEngine],
) -> None:
    engine = make_engine(llama)
    add(engine, "healthy", TEXT, greedy(4))
    engine.step()
    fields = {"request_id": "bad", "prompt_token_ids": TEXT, **request_fields}
    (output,) = engine.add(GenerateRequest(params=SamplingParams(max_tokens=2, **params), **fields))
    assert (output.request_id, failure_of(output).code) == ("bad", ErrorCode.REFUSED)
    assert message in failure_of(output).message
    assert engine.num_unfinished == 1
    first, rest = llama.expected(None, TEXT, 4)[0], tokens(run(engine)["healthy"])
    assert [first, *rest] == llama.expected(None, TEXT, 4)


def test_the_last_row_of_the_model_is_taken(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    last = VOCABULARY - 1
    params = greedy(3, logit_bias={last: 1e4}, stop_token_ids=(last,), ignore_eos=True, min_tokens=0)
    add(engine, "r", [last, 1], params)
    assert tokens(run(engine)["r"]) == [last]
