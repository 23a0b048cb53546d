"""Chat, completions and classification in the format of a version."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.api_fixtures import UploadParts
from tests.support.byte_tokenizer import BOS, ByteTokenizer
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}
TEMPLATE = {"type": "template", "template": "Q: {{ text }}\nA:"}


async def upload(client: httpx.AsyncClient, upload_parts: UploadParts, value: Any, name: str = "p") -> dict[str, Any]:
    text = value if isinstance(value, str) else json.dumps(value)
    seed = sum(name.encode())
    response = await client.post("/v1/prompts", **upload_parts(name, seed=seed, format=text))
    assert response.status_code == 201, response.text
    version: dict[str, Any] = response.json()
    return version


async def chat(client: httpx.AsyncClient, *messages: dict[str, str], **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"model": "p", "messages": list(messages)} | fields)


def text_of(engine: FakeEngine) -> tuple[str, bool]:
    """The text of the last request, and whether it began with the special token."""
    tokens = engine.requests[-1].prompt_token_ids
    special = tokens[0] == BOS
    return bytes(tokens[special:]).decode(), special


@pytest.mark.parametrize(
    ("value", "expected"),
    [("raw", ("hi", True)), (TEMPLATE, ("Q: hi\nA:", True)), ("chat", ("[user]hi[assistant]", False))],
)
async def test_chat_asks_in_the_format_of_the_version(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts, value: Any, expected: tuple[str, bool]
) -> None:
    await upload(client, upload_parts, value)
    assert (await chat(client, USER)).status_code == 200
    assert text_of(engine) == expected
    counted = (await client.post("/tokenize", json={"model": "p", "messages": [USER]})).json()["tokens"]
    assert counted == engine.requests[-1].prompt_token_ids


async def test_chat_with_a_raw_version_asks_what_a_completion_asks(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, "raw")
    answered = (await chat(client, USER)).json()["choices"][0]["message"]["content"]
    completed = (await client.post("/v1/completions", json={"model": "p", "prompt": "hi"})).json()
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids
    assert completed["choices"][0]["text"] == answered


async def test_a_raw_version_needs_no_chat_template(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer, upload_parts: UploadParts
) -> None:
    tokenizer.has_chat_template = False
    await upload(client, upload_parts, "raw")
    assert (await chat(client, USER)).status_code == 200
    await upload(client, upload_parts, "chat", name="q")
    refused = await client.post("/v1/completions", json={"model": "q", "prompt": "hi", "apply_format": True})
    assert refused.status_code == 400
    assert "no chat template" in refused.json()["error"]["message"]


@pytest.mark.parametrize("value", ["raw", TEMPLATE])
@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([SYSTEM, USER], {}, "messages"),
        ([USER, {"role": "assistant", "content": "hello"}, USER], {}, "messages"),
        ([SYSTEM], {}, "messages"),
        ([USER], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ([USER], {"documents": [{"text": "d"}]}, "documents"),
        ([USER], {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ([USER], {"continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_what_has_no_place_in_the_format_is_refused(
    client: httpx.AsyncClient,
    upload_parts: UploadParts,
    value: Any,
    messages: list[dict[str, str]],
    fields: dict[str, Any],
    param: str,
) -> None:
    await upload(client, upload_parts, value)
    response = await chat(client, *messages, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "has the format" in error["message"]


async def test_a_chat_format_adds_its_system_message_if_there_is_none(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, {"type": "chat", "system": "be short"})
    await chat(client, USER)
    assert text_of(engine)[0] == "[system]be short[user]hi[assistant]"
    await chat(client, SYSTEM, USER)
    assert text_of(engine)[0] == "[system]be kind[user]hi[assistant]"


async def test_completions_apply_nothing_unless_asked_to(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, TEMPLATE | {"sampling": {"max_tokens": 2, "temperature": 0, "stop": "l"}})
    body: dict[str, Any] = {"model": "p", "prompt": "hi"}
    plain = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert (text_of(engine), plain["text"]) == (("hi", True), "hello world")
    formatted = (await client.post("/v1/completions", json=body | {"apply_format": True})).json()["choices"][0]
    assert (text_of(engine), formatted["text"]) == (("Q: hi\nA:", True), "he")
    assert (engine.requests[-1].params.temperature, engine.requests[-1].params.max_tokens) == (0.0, 2)


async def test_the_request_overrides_the_sampling_of_the_format(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, {"type": "raw", "sampling": {"max_tokens": 2, "temperature": 0}})
    answer = await chat(client, USER, max_tokens=5, temperature=1.5)
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    assert engine.requests[-1].params.temperature == 1.5
    await chat(client, USER)
    assert engine.requests[-1].params.max_tokens == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "tiny"}, "the format of tiny is not known"),
        ({"model": "plain"}, "the format of plain@1 is not known"),
        ({"model": ["p", "q"], "ensemble": "mean"}, "have different formats"),
        ({"model": "p", "prompt": [104, 105]}, "requires prompt as text"),
    ],
)
async def test_a_format_that_cannot_be_applied_is_refused(
    client: httpx.AsyncClient, upload_parts: UploadParts, fields: dict[str, Any], message: str
) -> None:
    await upload(client, upload_parts, "raw")
    await upload(client, upload_parts, TEMPLATE, name="q")
    (await client.post("/v1/prompts", **upload_parts("plain", seed=7))).raise_for_status()
    response = await client.post("/v1/completions", json={"prompt": "hi", "apply_format": True} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "apply_format")
    assert message in error["message"]


async def test_chat_does_not_let_the_format_be_left_out(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    await upload(client, upload_parts, "raw")
    assert (await chat(client, USER, apply_format=True)).status_code == 200
    assert (await chat(client, USER, apply_format=False)).status_code == 400


async def test_classification_puts_the_separator_before_each_label(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, TEMPLATE | {"separator": "\n"})
    body = {"model": "p", "input": "hi", "labels": ["yes", "no"]}
    plain = (await client.post("/v1/classify", json=body)).json()
    assert text_of(engine) == ("hino", True)
    formatted = (await client.post("/v1/classify", json=body | {"apply_format": True})).json()
    assert text_of(engine) == ("Q: hi\nA:\nno", True)
    assert list(plain["data"][0]["probabilities"]) == list(formatted["data"][0]["probabilities"]) == ["yes", "no"]


async def test_classification_formats_chats_without_special_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, "chat")
    body = {"model": "p", "input": "hi", "labels": ["yes"], "apply_format": True}
    await client.post("/v1/classify", json=body)
    assert text_of(engine) == ("[user]hi[assistant]yes", False)
    await client.post("/v1/classify", json=body | {"add_special_tokens": True})
    assert text_of(engine) == ("[user]hi[assistant]yes", True)


async def test_the_record_of_a_version_has_its_format(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    version = await upload(client, upload_parts, TEMPLATE)
    assert version["format"] == TEMPLATE
    of_the_upload: dict[str, list[str]] = {"changed": [], "warnings": []}
    assert (await client.get("/v1/prompts/p/versions/1")).json() | of_the_upload == version
    unknown = (await client.post("/v1/prompts", **upload_parts("u", seed=9))).json()
    assert unknown["format"] is None


async def test_a_promotion_between_two_formats_never_mixes_them(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, "raw")
    first = await chat(client, USER)
    response = await client.post("/v1/prompts", **upload_parts("p", seed=99, format=json.dumps(TEMPLATE)))
    response.raise_for_status()
    second = await chat(client, USER)
    assert [answer.headers["x-prelude-prompt"] for answer in (first, second)] == ["p@1", "p@2"]
    assert text_of(engine)[0] == "Q: hi\nA:"
