from __future__ import annotations

import json
from typing import Any
from unittest import mock

import httpx
import pytest
from fastapi import FastAPI

from tests.support.api_fixtures import CountingStore, WaitUntil
from tests.support.byte_tokenizer import BOS
from tests.support.fake_engine import FakeEngine
from tests.support.presence import present

pytestmark = pytest.mark.anyio

REPLY = "hello world"


async def complete(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 20} | fields
    return await client.post("/v1/completions", json=body)


async def chunks(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await complete(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_one_prompt_is_completed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await complete(client)
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 12,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 2, "virtual_tokens": 0},
        },
    }
    assert engine.requests[0].prompt_token_ids == [256, 97, 98, 99]
    assert engine.requests[0].soft_prompt is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["a", "bc"], [[256, 97], [256, 98, 99]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_every_form_of_prompt_is_accepted(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: list[Any], expected: list[list[int]]
) -> None:
    body = (await complete(client, prompt=prompt)).json()
    assert [request.prompt_token_ids for request in engine.requests] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert all(choice["text"] == REPLY for choice in body["choices"])
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 12 * len(expected)
    assert len({request.request_id for request in engine.requests}) == len(expected)


async def test_unset_sampling_fields_have_defaults(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "a"})
    params = engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (16, 1.0, 1.0, 0, None)


async def test_null_fields_count_as_absent_and_unknown_fields_are_ignored(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    names = (
        "max_tokens temperature top_p top_k seed stop stop_token_ids stream stream_options n logprobs echo "
        "logit_bias prompt_id user task_id return_token_ids"
    )
    nulls = dict.fromkeys(names.split())
    response = await complete(client, **nulls, no_such_field={"a": 1})
    assert response.status_code == 200, response.text
    assert engine.requests[0].params.max_tokens == 16


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 7, "stop_token_ids": [9], "ignore_eos": True}
    assert (await complete(client, **fields)).status_code == 200
    params = engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 0, 7)
    assert params.stop_token_ids == (9,)
    assert params.ignore_eos
    assert params.max_tokens == 20


async def test_max_tokens_ends_an_answer_with_length(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, max_tokens=5)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")


async def test_special_tokens_can_be_omitted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, add_special_tokens=False)
    assert engine.requests[0].prompt_token_ids == [97, 98, 99]


async def test_the_end_token_counts_but_adds_no_text(client: httpx.AsyncClient) -> None:
    fields = {"return_token_ids": True, "skip_special_tokens": False}
    choice = (await complete(client, **fields)).json()["choices"][0]
    assert choice["text"] == REPLY
    assert choice["token_ids"] == [*REPLY.encode(), 257]
    assert choice["prompt_token_ids"] == [256, 97, 98, 99]
    kept = (await complete(client, include_stop_str_in_output=True, **fields)).json()["choices"][0]
    assert kept["text"] == REPLY + "</s>"


async def test_stop_token_ids_end_an_answer(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, stop_token_ids=[ord("o")])).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hell", "stop")


@pytest.mark.parametrize("stop", ["wor", ["zzz", "wor"]])
@pytest.mark.parametrize(("include", "text"), [(False, "hello "), (True, "hello wor")])
async def test_a_stop_string_ends_the_text_and_aborts_the_sequence(
    client: httpx.AsyncClient, engine: FakeEngine, stop: str | list[str], include: bool, text: str
) -> None:
    body = (await complete(client, stop=stop, include_stop_str_in_output=include)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert [ending for _, ending in engine.ended] == ["abort"]
    assert body["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("include", "text"), [(False, "he"), (True, "he<s>")])
async def test_a_hidden_special_token_works_as_a_stop_string(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, include: bool, text: str
) -> None:
    engine.reply = mock.Mock(encode=lambda: [*b"he", BOS, *b"llo"])
    for skip in (True, False):
        body: dict[str, Any] = (
            {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        )
        body |= {"stop": ["zzz", "<s>"], "include_stop_str_in_output": include, "skip_special_tokens": skip}
        choice = (await client.post(path, json=body)).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text


async def test_a_character_split_between_prompt_and_answer_is_returned_whole(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.reply = mock.Mock(encode=lambda: [0xA9, *b"t"])
    fields = {"prompt": [97, 0xC3], "logprobs": 0, "ignore_eos": True}
    choice = (await complete(client, **fields)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("ét", [0, 1])
    choice = (await complete(client, echo=True, **fields)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("aét", [0, 1, 1, 2])
    pieces = await chunks(client, echo=True, **fields)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "aét"


async def test_usage_counts_virtual_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, store: CountingStore, sentiment: str
) -> None:
    body = (await complete(client, model=sentiment)).json()
    assert body["model"] == sentiment
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2, "virtual_tokens": 4}
    source = present(engine.requests[0].soft_prompt)
    assert source.num_virtual_tokens == 4
    assert not source.is_key_values
    assert source.digest == store.leased[0].version.digest


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "sentiment"},
        {"model": "sentiment@1"},
        {"model": "sentiment@latest"},
        {"model": "tiny:sentiment"},
        {"model": "tiny:sentiment@1"},
        {"model": "tiny", "prompt_id": "sentiment"},
        {"model": None, "prompt_id": "sentiment@1"},
    ],
)
async def test_every_way_to_name_a_soft_prompt_works(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str, fields: dict[str, Any]
) -> None:
    assert (await complete(client, **fields)).status_code == 200
    assert engine.requests[0].soft_prompt is not None


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "no-such"}, 404, "model_not_found", "model"),
        ({"model": "GPT 4"}, 404, "model_not_found", "model"),
        ({"model": "sentiment@9"}, 404, "prompt_not_found", "model"),
        ({"model": "tiny:no-such"}, 404, "prompt_not_found", "model"),
        ({"prompt_id": "no-such"}, 404, "prompt_not_found", "prompt_id"),
        ({"prompt_id": "Bad Name"}, 400, "invalid_request", "prompt_id"),
        ({"model": "sentiment", "prompt_id": "sentiment"}, 400, "invalid_request", "prompt_id"),
    ],
)
async def test_names_that_do_not_resolve_are_refused(
    client: httpx.AsyncClient,
    sentiment: str,
    store: CountingStore,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str,
) -> None:
    response = await complete(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert len(store.leased) == len(store.released) == 0


async def test_a_batch_resolves_its_soft_prompt_once(
    client: httpx.AsyncClient, engine: FakeEngine, store: CountingStore, sentiment: str
) -> None:
    assert (await complete(client, model=sentiment, prompt=["a", "b", "c"])).status_code == 200
    assert len(store.leased) == 1
    assert len({present(request.soft_prompt).digest for request in engine.requests}) == 1


async def test_a_stream_adds_up_to_the_answer(client: httpx.AsyncClient) -> None:
    pieces = await chunks(client)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == REPLY
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert len({piece["id"] for piece in pieces}) == 1
    assert set(pieces[0]) == {"id", "object", "created", "model", "choices"}
    assert set(pieces[0]["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


async def test_a_stream_of_several_prompts_numbers_its_choices(client: httpx.AsyncClient) -> None:
    pieces = await chunks(client, prompt=["a", "b", "c"])
    for index in range(3):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == REPLY
        assert own[-1]["finish_reason"] == "stop"


async def test_a_stream_withholds_a_possible_stop_string(client: httpx.AsyncClient) -> None:
    pieces = await chunks(client, stop="world!")
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert texts == [*"hello ", "world"]


async def test_a_stream_ends_with_usage_on_request(client: httpx.AsyncClient) -> None:
    pieces = await chunks(client, stream_options={"include_usage": True})
    assert all(piece["usage"] is None for piece in pieces[:-1])
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] == 12


async def test_a_stream_has_continuous_usage_on_request(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = await chunks(client, stream_options=options)
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [*range(1, 13), 12]


async def test_a_stream_has_token_ids_on_request(client: httpx.AsyncClient) -> None:
    pieces = [piece["choices"][0] for piece in await chunks(client, return_token_ids=True)]
    assert [token for piece in pieces for token in piece["token_ids"]] == [*REPLY.encode(), 257]
    assert pieces[0]["prompt_token_ids"] == [256, 97, 98, 99]
    assert all("prompt_token_ids" not in piece for piece in pieces[1:])


async def test_a_stream_never_splits_a_character(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "naïve 日本語 🙂"
    pieces = await chunks(client, max_tokens=60)
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert "".join(texts) == engine.reply
    assert not any("�" in text for text in texts)


async def test_permits_and_leases_are_released(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    app: FastAPI,
    sentiment: str,
    eventually: WaitUntil,
) -> None:
    services = app.state.services
    await complete(client, model=sentiment, prompt=["a", "b"])
    await chunks(client, model=sentiment, prompt=["a", "b"])
    eventually(lambda: len(store.released) == 2)
    assert store.leased == store.released
    assert services.admission.num_in_use == 0
    assert len(engine.ended) == len(engine.requests) == 4
