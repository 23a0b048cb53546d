from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
RENDERED = "[system]be kind[user]hi[assistant]"


async def test_a_conversation_gets_an_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["prompt_tokens"] == len(RENDERED)
    assert bytes(engine.requests[0].prompt_token_ids).decode() == RENDERED


async def test_developer_messages_become_system_messages(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [{"role": "developer", "content": "be kind"}, MESSAGES[1]]
    await client.post("/v1/chat/completions", json={"messages": messages})
    assert bytes(engine.requests[0].prompt_token_ids).decode() == RENDERED
    tokens = (await client.post("/tokenize", json={"messages": messages})).json()["tokens"]
    assert bytes(tokens).decode() == RENDERED


async def test_the_default_max_tokens_is_the_rest_of_the_context(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str
) -> None:
    await client.post("/v1/chat/completions", json={"model": sentiment, "messages": MESSAGES})
    assert engine.requests[0].params.max_tokens == 256 - 4 - len(RENDERED)


@pytest.mark.parametrize("fields", [{"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}])
async def test_max_tokens_and_max_completion_tokens_limit_the_answer(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    body = (await client.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)).json()
    assert body["choices"][0]["message"]["content"] == "hel"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_text_parts_are_joined(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    assert bytes(engine.requests[0].prompt_token_ids).decode() == "[user]a\nb[assistant]"


async def test_a_stream_has_the_text_of_the_answer(client: httpx.AsyncClient) -> None:
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/chat/completions", json=body)
    events = [event.removeprefix("data: ") for event in response.text.removesuffix("\n\n").split("\n\n")]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event) for event in events]
    usage = pieces.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == "hello world"
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


async def test_a_stream_has_token_ids_on_request(client: httpx.AsyncClient) -> None:
    body = {"messages": MESSAGES, "stream": True, "return_token_ids": True}
    response = await client.post("/v1/chat/completions", json=body)
    events = response.text.removesuffix("\n\n").split("\n\n")[:-1]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == [*b"hello world", 257]
    assert [choice for choice in choices if "prompt_token_ids" in choice] == choices[:1]


async def test_a_model_without_a_template_refuses_chat(client: httpx.AsyncClient, tokenizer: ByteTokenizer) -> None:
    tokenizer.has_chat_template = False
    response = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]
