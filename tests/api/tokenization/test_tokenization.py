"""vLLM's tokenizer routes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.api.tokenization import routes as tokenization
from tests.support.byte_tokenizer import BOS, EOS, ByteTokenizer
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def test_text_is_tokenised(client: httpx.AsyncClient) -> None:
    reply = await client.post("/tokenize", json={"prompt": "hé"})
    assert reply.json() == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [BOS, *"hé".encode()],
        "token_strs": None,
    }
    reply = await client.post(
        "/tokenize", json={"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
    )
    assert reply.json() == {"count": 2, "max_model_len": 256, "tokens": [97, 98], "token_strs": ["a", "b"]}
    assert (await client.post("/tokenize", json={"prompt": "", "add_special_tokens": False})).json()["tokens"] == []


async def test_a_conversation_has_the_same_tokens_as_in_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    tokens = (await client.post("/tokenize", json={"messages": messages})).json()["tokens"]
    await client.post("/v1/chat/completions", json={"messages": messages})
    assert engine.requests[0].prompt_token_ids == tokens
    special = await client.post("/tokenize", json={"messages": messages, "add_special_tokens": True})
    assert special.json()["tokens"] == [BOS, *tokens]


async def test_tokens_are_decoded(client: httpx.AsyncClient) -> None:
    reply = await client.post("/detokenize", json={"tokens": [BOS, *b"abc", EOS]})
    assert reply.json() == {"prompt": "<s>abc</s>"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_the_tokenizer_configuration_is_returned(client: httpx.AsyncClient) -> None:
    info = (await client.get("/tokenizer_info")).json()
    assert info == {
        "tokenizer_class": "ByteTokenizer",
        "model_max_length": 256,
        "vocab_size": 258,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": None,
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "prompt_id": "No"}, "prompt_id"),
    ],
)
async def test_errors_name_the_bad_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_sizes_are_limited(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "MAX_TEXT_CHARS", 8)
    messages = [{"role": "user", "content": "12345"}] * 2
    error = (await client.post("/tokenize", json={"messages": messages})).json()["error"]
    assert error["param"] == "messages"
    properties = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert properties["DetokenizeBody"]["properties"]["tokens"]["maxItems"] == tokenization.MAX_TOKENS


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_the_model_must_exist(client: httpx.AsyncClient, path: str, sentiment: str) -> None:
    text = {"prompt": "a", "tokens": [1]}
    assert (await client.post(path, json=text | {"model": sentiment})).status_code == 200
    assert (await client.post(path, json=text | {"model": "tiny", "prompt_id": sentiment})).status_code == 200
    error = (await client.post(path, json=text | {"model": "nothing"})).json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error = (await client.post(path, json=text | {"prompt_id": "nothing"})).json()["error"]
    assert (error["code"], error["param"]) == ("prompt_not_found", "prompt_id")
    assert (await client.post(path, content="{}", headers={"content-type": "text/plain"})).status_code == 415


async def test_a_model_without_a_template_refuses_messages(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer
) -> None:
    tokenizer.has_chat_template = False
    response = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
