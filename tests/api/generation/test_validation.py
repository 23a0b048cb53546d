from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.request_body import MAX_LOCATION_DEPTH, half_pair_in, may_have_halves
from server.errors import ContextLengthError
from tests.support.api_fixtures import CountingStore
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import CONTEXT, FakeEngine

pytestmark = pytest.mark.anyio


async def refused(client: httpx.AsyncClient, fields: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "abc"}
    response = await client.post(path, json={"model": "tiny"} | prompt | fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


COMPLETION_UNSUPPORTED = {
    "best_of": (2, 1),
    "suffix": ("x", ""),
}
CHAT_UNSUPPORTED = {
    "chat_template": ("{{ x }}", None),
}
UNSUPPORTED = [("/v1/completions", field, *values) for field, values in COMPLETION_UNSUPPORTED.items()]
UNSUPPORTED += [("/v1/chat/completions", field, *values) for field, values in CHAT_UNSUPPORTED.items()]


@pytest.mark.parametrize(("path", "field", "asking", "no_op"), UNSUPPORTED)
async def test_known_fields_of_unsupported_features_are_refused(
    client: httpx.AsyncClient, path: str, field: str, asking: int | str, no_op: int | str | None
) -> None:
    error = await refused(client, {field: asking}, path)
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "abc"}
    response = await client.post(path, json=prompt | {field: no_op})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"task_id": -1}, "task_id"),
        ({"task_id": "0"}, "task_id"),
        ({"task_id": True}, "task_id"),
        ({"task_id": 1.0}, "task_id"),
        ({"task_id": 2**63}, "task_id"),
        ({"task_id": 0}, "task_id"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 9}, "n"),
        ({"n": 3, "prompt": ["a"] * 3}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": 5}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 9}, "prompt"),
    ],
)
async def test_values_out_of_range_name_the_field(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    assert (await refused(client, fields))["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ],
)
async def test_bad_conversations_are_refused(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert (await refused(client, fields, "/v1/chat/completions"))["param"] == param


async def test_all_errors_are_reported(client: httpx.AsyncClient) -> None:
    error = await refused(client, {"temperature": 9, "top_p": 9, "prompt": 5})
    assert {detail["field"] for detail in error["details"]} == {"temperature", "top_p", "prompt"}


async def test_inputs_are_not_echoed(client: httpx.AsyncClient) -> None:
    assert "s3cret" not in str(await refused(client, {"temperature": "s3cret", "prompt": {"s3cret": 1}}))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"5", b"", b"\xff", b'{"prompt": NaN}', b"[" * 5000])
async def test_bodies_that_are_not_a_json_object_are_refused(client: httpx.AsyncClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
async def test_numbers_that_are_not_finite_are_refused(client: httpx.AsyncClient, number: str) -> None:
    content = b'{"prompt": "x", "temperature": ' + number.encode() + b"}"
    response = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_other_content_types_are_refused(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(
        "/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": content_type}
    )
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_a_body_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x" * 70_000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


async def test_a_chunked_body_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(70):
            yield b"x" * 1000

    response = await client.post("/v1/completions", content=body(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


async def test_the_context_error_gives_the_lengths(client: httpx.AsyncClient, sentiment: str) -> None:
    # 256 positions: 4 virtual, 1 + 200 text, so 51 are left.
    fields = {"model": sentiment, "prompt": "x" * 200}
    error = await refused(client, fields | {"max_tokens": 52})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    for number in ("256", "4 virtual", "201 text", "52"):
        assert number in error["message"]
    response = await client.post("/v1/completions", json=fields | {"max_tokens": 51})
    assert response.status_code == 200


async def test_the_default_max_tokens_is_clipped_and_an_explicit_one_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"model": "tiny", "prompt": "x" * 250}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert engine.requests[0].params.max_tokens == 5
    assert (await refused(client, body | {"max_tokens": 6}))["param"] == "max_tokens"


@pytest.mark.parametrize("max_tokens", [None, 1])
async def test_a_prompt_without_room_for_one_token_is_refused(
    client: httpx.AsyncClient, store: CountingStore, max_tokens: int | None
) -> None:
    error = await refused(client, {"prompt": "x" * 255, "max_tokens": max_tokens})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("path", "field", "text"),
    [
        ("/v1/completions", "prompt", "x"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "x"}]),
        ("/v1/classify", "input", "x"),
    ],
)
async def test_the_tokenizer_gets_the_context_length_and_the_field(
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    field: str,
    text: str | list[dict[str, Any]],
) -> None:
    async def refuse(_self: object, _texts: object, *, most: int | None, field: str, **_options: object) -> None:
        raise ContextLengthError(f"{field}: far over {most} tokens", param=field)

    monkeypatch.setattr(ByteTokenizer, "encode", refuse)
    extra = {"labels": ["a", "b"]} if field == "input" else {}
    error = await refused(client, {"prompt": None, field: text} | extra, path)
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert error["message"] == f"{field}: far over {CONTEXT} tokens"


HALF = "a\ud83d"
CHAT = {"messages": [{"role": "user", "content": "a"}]}


def tool(**function: Any) -> dict[str, object]:
    return CHAT | {"tools": [{"type": "function", "function": {"name": "f"} | function}]}


def called(call_id: str, arguments: str) -> dict[str, object]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": HALF}, "prompt"),
        ("/v1/completions", {"prompt": ["a", HALF]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "a", "stop": HALF}, "stop"),
        ("/v1/completions", {"prompt": "a", "user": HALF}, "user"),
        ("/v1/completions", {"prompt": "a", "model": HALF}, "model"),
        ("/v1/completions", {"prompt": "a", "prompt_id": HALF}, "prompt_id"),
        ("/v1/completions", {"prompt": "a", HALF: 1}, None),
        (
            "/v1/completions",
            {"prompt": "a", "structured_outputs": {"choice": ["b", HALF]}},
            "structured_outputs.choice[1]",
        ),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": HALF}}, "structured_outputs.regex"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"grammar": HALF}}, "structured_outputs.grammar"),
        (
            "/v1/completions",
            {"prompt": "a", "structured_outputs": {"json": {"properties": {HALF: {}}}}},
            "structured_outputs.json.properties",
        ),
        (
            "/v1/completions",
            {"prompt": "a", "structured_outputs": {"json": '{"enum": ["\\ud83d"]}'}},
            "structured_outputs.json",
        ),
        ("/v1/chat/completions", CHAT | {"stop": ["b", HALF]}, "stop[1]"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "name": HALF}]}, "messages[0].name"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            "messages[0].content[0].text",
        ),
        ("/v1/chat/completions", tool(description=HALF), "tools[0].function.description"),
        (
            "/v1/chat/completions",
            tool(parameters={"properties": {"k": {"enum": [HALF]}}}),
            "tools[0].function.parameters.properties.k.enum[0]",
        ),
        (
            "/v1/chat/completions",
            called("1", '{"k": "\\udc00"}'),
            "messages[1].tool_calls[0].function.arguments",
        ),
        ("/v1/chat/completions", called(HALF, "{}"), "messages[1].tool_calls[0].id"),
        ("/tokenize", {"prompt": HALF}, "prompt"),
        ("/v1/classify", {"input": "a", "labels": ["b", HALF]}, "labels[1]"),
        ("/v1/classify", {"input": ["a", HALF], "labels": ["b"]}, "input[1]"),
    ],
)
async def test_text_with_half_of_a_surrogate_pair_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], param: str | None
) -> None:
    # As an escape, as clients write it; as invalid UTF-8, which Python's JSON accepts; and as UTF-16.
    text = json.dumps({"model": "tiny"} | fields)
    raw = json.dumps({"model": "tiny"} | fields, ensure_ascii=False)
    for content in (text.encode(), raw.encode(errors="surrogatepass"), text.encode("utf-16")):
        response = await client.post(path, content=content, headers={"content-type": "application/json"})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert "half of a surrogate pair" in error["message"]
    assert engine.requests == []


async def test_whole_pairs_and_unusual_characters_are_accepted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = '"a\\ud83d\\ude00\\u0000\\uffff\\ufeff\\ufffd\\u202e\\\\ud83d"'
    for path, fields in (
        ("/v1/completions", f'"prompt": {text}'),
        ("/v1/chat/completions", f'"messages": [{{"role": "user", "content": {text}}}], "user": {text}'),
    ):
        content = f'{{"model": "tiny", {fields}}}'
        response = await client.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text


json_values = st.recursive(
    st.one_of(st.text(), st.text(st.characters(categories=["Cs", "Ll"])), st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(st.characters()), inner)),
)


@given(json_values)
def test_an_unpaired_surrogate_is_found_exactly_if_there_is_one(value: Any) -> None:
    value = json.loads(json.dumps(value))  # two halves that stand beside each other become a character
    body = json.dumps(value)
    loc = half_pair_in(json.loads(body))
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        assert may_have_halves(body.encode())
        assert loc is not None
        for part in loc:
            value = value[part]
        with pytest.raises(UnicodeEncodeError):
            json.dumps(value, ensure_ascii=False).encode()
    else:
        assert loc is None


def test_a_deeply_nested_unpaired_surrogate_is_found() -> None:
    value: Any = HALF
    for _ in range(50_000):
        value = [value]
    assert half_pair_in(value) == (0,) * MAX_LOCATION_DEPTH
