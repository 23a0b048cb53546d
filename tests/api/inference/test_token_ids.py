"""Token ids without a row in the model, in every field that accepts ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.inference.token_ids import check_token_ids
from server.errors import InvalidRequestError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import BASE, FakeEngine

pytestmark = pytest.mark.anyio

ROWS = 258
ADDED = "\u2603"
"""A text whose token the model has no row for."""


class ExtendedTokenizer(ByteTokenizer):
    """A tokenizer with one token more than the model has rows; other characters are ASCII."""

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, most: int | None = None, field: str = "prompt"
    ) -> list[list[int]]:
        return [[ROWS if char == ADDED else ord(char) for char in text] for text in texts]


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ExtendedTokenizer()


COMPLETION, CHAT, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/classify"
LABELS = [" good", " bad"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETION, {"prompt": [1, ROWS]}, "prompt"),
        (COMPLETION, {"prompt": [[1, 2], [2**62]]}, "prompt"),
        (COMPLETION, {"prompt": [-1]}, "prompt"),
        (COMPLETION, {"prompt": f"hello {ADDED} world"}, "prompt"),
        (COMPLETION, {"prompt": [1, ROWS], "echo": True, "logprobs": 1, "max_tokens": 0}, "prompt"),
        (COMPLETION, {"prompt": "a", "logit_bias": {str(ROWS): 5}}, "logit_bias"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"-1": 5}}, "logit_bias"),
        (COMPLETION, {"prompt": "a", "stop_token_ids": [ROWS + 7]}, "stop_token_ids"),
        (COMPLETION, {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids[0]"),
        (CHAT, {"messages": [{"role": "user", "content": ADDED}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "logit_bias": {str(ROWS): 1}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "stop_token_ids": [ROWS]}, "stop_token_ids"),
        (CLASSIFY, {"input": [[1, ROWS]], "labels": LABELS}, "input"),
        (CLASSIFY, {"input": ADDED, "labels": LABELS}, "input"),
        (CLASSIFY, {"input": "a", "labels": [f" {ADDED}", " bad"]}, "labels"),
    ],
)
async def test_an_id_without_a_row_is_refused_and_never_reaches_the_engine(
    path: str, body: dict[str, Any], param: str, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await client.post(path, json={"model": BASE, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


async def test_each_member_of_an_ensemble_is_checked(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str
) -> None:
    for how in ("vote", "mean"):
        body = {"model": [BASE, sentiment], "ensemble": how, "prompt": ADDED}
        response = await client.post(COMPLETION, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert engine.requests == []


async def test_the_error_names_the_label_and_the_token_id(client: httpx.AsyncClient) -> None:
    body = {"model": BASE, "input": "a", "labels": [" good", f" {ADDED}"]}
    message = (await client.post(CLASSIFY, json=body)).json()["error"]["message"]
    assert message == f"labels: {f' {ADDED}'!r}: token id 258 is not in the vocabulary of 258 tokens"


async def test_detokenize_accepts_ids_that_the_model_has_rows_for(client: httpx.AsyncClient) -> None:
    refused = await client.post("/detokenize", json={"tokens": [65, ROWS]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    assert (await client.post("/detokenize", json={"tokens": [65, ROWS - 1]})).status_code == 200


@given(st.lists(st.integers(-3, 12)), st.integers(1, 10))
def test_exactly_the_ids_below_the_number_of_rows_are_accepted(token_ids: list[int], vocab_size: int) -> None:
    wrong = [token_id for token_id in token_ids if token_id not in range(vocab_size)]
    if not wrong:
        check_token_ids(token_ids, vocab_size=vocab_size, param="prompt")
        return
    with pytest.raises(InvalidRequestError) as raised:
        check_token_ids(token_ids, vocab_size=vocab_size, param="prompt")
    assert raised.value.param == "prompt"
    assert any(f"token id {token_id} is not" in raised.value.message for token_id in wrong)
