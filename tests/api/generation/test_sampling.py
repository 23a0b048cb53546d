"""Sampling parameters, several choices, logprobs and echo over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

REPLY = b"hello world"
NEW = [*REPLY, 257]
PROMPT = [256, *b"abc"]
MESSAGES = [{"role": "user", "content": "hi"}]


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 20} | fields
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"messages": MESSAGES} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    prompt = {"messages": MESSAGES} if "chat" in path else {"prompt": "abc"}
    response = await client.post(path, json=prompt | {"max_tokens": 20, "stream": True} | fields)
    assert response.status_code == 200, response.text
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def joined(choices: list[dict[str, Any]]) -> dict[str, list[Any]]:
    every = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    return {name: [item for one in every for item in one[name]] for name in every[0]}


async def test_fields_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "min_tokens": 2,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -2,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -100, "7": 0.5},
    }
    await complete(client, **fields)
    await chat(client, **fields)
    for request in engine.requests:
        params = request.params
        assert (params.min_tokens, params.min_p, params.presence_penalty) == (2, 0.1, 0.5)
        assert (params.frequency_penalty, params.repetition_penalty) == (-2.0, 1.2)
        assert params.logit_bias == {5: -100.0, 7: 0.5}
        assert (params.logprobs, params.prompt_logprobs) == (None, None)


async def test_null_fields_count_as_absent(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    common = [
        "min_tokens",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "n",
        "logprobs",
    ]
    await complete(client, **dict.fromkeys([*common, "echo", "max_completion_tokens"]))
    await chat(client, max_tokens=20, **dict.fromkeys([*common, "top_logprobs", "max_completion_tokens"]))
    await complete(client)
    first, second, third = (request.params for request in engine.requests)
    assert first == second == third


async def test_max_completion_tokens_of_a_completion(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, max_completion_tokens=3))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hel", "length")


async def test_usage_counts_the_prompt_of_several_choices_once(
    client: httpx.AsyncClient, engine: FakeEngine, app: FastAPI, sentiment: str
) -> None:
    body = await complete(client, model=sentiment, prompt=["abc", "d"], n=3, seed=5)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert all(choice["text"] == REPLY.decode() for choice in body["choices"])
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 72,
        "total_tokens": 78,
        "prompt_tokens_details": {"cached_tokens": 4, "virtual_tokens": 8},
    }
    assert sorted(len(request.prompt_token_ids) for request in engine.requests) == [2, 2, 2, 4, 4, 4]
    assert app.state.services.admission.num_in_use == 0


async def test_each_choice_has_a_separate_seed_derived_from_the_requests_seed(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for _ in range(2):
        await complete(client, n=4, seed=5)
    await complete(client, seed=5)
    seeds = [request.params.seed for request in engine.requests]
    assert len(set(seeds[:4])) == 4
    assert seeds[:4] == seeds[4:8]
    assert seeds[8] == seeds[0] == 5
    await complete(client, n=2)
    assert {request.params.seed for request in engine.requests[9:]} == {None}


async def test_several_answers_are_returned(client: httpx.AsyncClient) -> None:
    body = await chat(client, n=2)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["prompt_tokens"] == len("[user]hi[assistant]")
    pieces = await stream(client, "/v1/chat/completions", n=2, stream_options={"include_usage": True})
    assert pieces.pop()["usage"]["completion_tokens"] == 24
    for index in range(2):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "stop"


async def test_a_completion_has_logprobs(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [*REPLY.decode(), "</s>"]
    assert logprobs["token_logprobs"] == [-token / 512 for token in NEW]
    assert logprobs["text_offset"] == [*range(11), 11]
    assert logprobs["top_logprobs"][0] == {"h": -104 / 512, "i": -104 / 512 - 1}
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]


async def test_zero_logprobs_return_the_chosen_tokens_only(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["token_logprobs"]) == 12


async def test_too_many_echoed_logprobs_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.generation.generation.MAX_ECHOED_LOGPROBS", 23)
    body = {"prompt": "abc", "logprobs": 2, "echo": True, "n": 2}
    error = (await client.post("/v1/completions", json=body)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "logprobs")
    assert engine.requests == []
    await complete(client, logprobs=2, echo=True)


@pytest.mark.parametrize("max_tokens", [1, 20])
async def test_echo_with_logprobs(client: httpx.AsyncClient, max_tokens: int) -> None:
    choice = (await complete(client, echo=True, logprobs=1, max_tokens=max_tokens))["choices"][0]
    new = NEW[:max_tokens]
    assert choice["text"] == "abc" + REPLY[:max_tokens].decode()
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, *[-token / 512 for token in [*PROMPT[1:], *new]]]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 0, 1, 2, *range(3, 3 + len(new))]
    assert {len(entries) for entries in logprobs.values()} == {len(PROMPT) + len(new)}


async def test_the_end_token_has_a_logprobs_entry_but_no_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = ""
    choice = (await complete(client, echo=True, logprobs=1, max_tokens=1))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
    assert {len(entries) for entries in choice["logprobs"].values()} == {len(PROMPT) + 1}


async def test_a_prompt_can_be_scored_without_generating(client: httpx.AsyncClient) -> None:
    body = await complete(client, echo=True, logprobs=1, max_tokens=0)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert len(choice["logprobs"]["token_logprobs"]) == len(PROMPT)
    assert body["usage"]["completion_tokens"] == 0
    plain = (await complete(client, echo=True, max_tokens=0))["choices"][0]
    assert (plain["text"], plain["logprobs"]) == ("abc", None)


async def test_a_soft_prompt_gives_the_first_token_a_logprob(client: httpx.AsyncClient, sentiment: str) -> None:
    logprobs = (await complete(client, model=sentiment, echo=True, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] == -0.5
    assert {len(entries) for entries in logprobs.values()} == {len(PROMPT) + len(NEW)}


@pytest.mark.parametrize("prompt", [["abc", "d"], [[97, 98], [99]]])
async def test_every_choice_echoes_its_prompt(client: httpx.AsyncClient, prompt: list[Any]) -> None:
    body = await complete(client, prompt=prompt, echo=True, logprobs=0, n=2)
    texts = ["abc", "abc", "d", "d"] if isinstance(prompt[0], str) else ["ab", "ab", "c", "c"]
    assert [choice["text"] for choice in body["choices"]] == [text + REPLY.decode() for text in texts]


async def test_logprobs_cover_exactly_the_returned_tokens(client: httpx.AsyncClient) -> None:
    fields = {"stop": "wor", "logprobs": 1, "return_token_ids": True}
    choice = (await complete(client, **fields))["choices"][0]
    assert choice["text"] == "hello "
    assert choice["token_ids"] == [*b"hello wor"]
    assert choice["logprobs"]["tokens"] == [*"hello wor"]


async def test_parts_of_a_character_have_logprobs_entries(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "é!"
    logprobs = (await complete(client, logprobs=1, ignore_eos=True))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert logprobs["text_offset"] == [0, 0, 1]
    content = (await chat(client, logprobs=True, ignore_eos=True))["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [33]]


async def test_a_chat_answer_has_logprobs(client: httpx.AsyncClient) -> None:
    logprobs = (await chat(client, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert logprobs["content"][0] == {
        "token": "h",
        "logprob": -104 / 512,
        "bytes": [104],
        "top_logprobs": [
            {"token": "h", "logprob": -104 / 512, "bytes": [104]},
            {"token": "i", "logprob": -104 / 512 - 1, "bytes": [105]},
        ],
    }
    assert len(logprobs["content"]) == 12
    bare = (await chat(client, logprobs=True))["choices"][0]["logprobs"]
    assert all(entry["top_logprobs"] == [] for entry in bare["content"])


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"stop": "world!"}, {"echo": True, "max_tokens": 0}])
async def test_a_stream_has_the_same_logprobs_as_the_answer(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    whole = (await complete(client, logprobs=2, **fields))["choices"][0]
    pieces = [piece["choices"][0] for piece in await stream(client, "/v1/completions", logprobs=2, **fields)]
    assert joined(pieces) == whole["logprobs"]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]


async def test_a_chat_stream_has_the_same_logprobs_as_the_answer(client: httpx.AsyncClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 1}
    whole = (await chat(client, **fields))["choices"][0]["logprobs"]
    pieces = [piece["choices"][0] for piece in await stream(client, "/v1/chat/completions", **fields)]
    assert [entry for piece in pieces for entry in (piece["logprobs"] or {"content": []})["content"]] == whole[
        "content"
    ]
