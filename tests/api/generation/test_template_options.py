"""Chat template options of a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from server.api.generation.template_options import MAX_TEMPLATE_CHARS, RESERVED
from server.demo.tour import MODEL_DIRECTORY
from server.tokenizer import Tokenizer
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure,"}]
ROUTES = ["/v1/chat/completions", "/tokenize"]


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}]} | fields


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": False, "chat_template_kwargs": {}}, {"add_generation_prompt": True}),
        ({"continue_final_message": True}, {"add_generation_prompt": False, "continue_final_message": True}),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "x": None}},
            {"add_generation_prompt": True, "enable_thinking": False, "x": None},
        ),
        (
            {"documents": [{"title": "a", "text": "b"}]},
            {"add_generation_prompt": True, "documents": [{"title": "a", "text": "b"}]},
        ),
        (
            {"reasoning_effort": "none"},
            {"add_generation_prompt": True, "reasoning_effort": "none", "enable_thinking": False},
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            {"add_generation_prompt": True, "reasoning_effort": "low", "enable_thinking": False},
        ),
    ],
)
async def test_options_reach_the_template(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer, path: str, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    response = await client.post(path, json=body(**fields))
    assert response.status_code == 200, response.text
    assert tokenizer.options == options


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": 1}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * MAX_TEMPLATE_CHARS}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x"} | dict.fromkeys(["tokenize"], False)}, "chat_template_kwargs"),
        ({"documents": [1]}, "documents[0]"),
        ({"documents": [{}] * 129}, "documents"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
)
async def test_bad_options_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("name", sorted(RESERVED))
async def test_no_variable_replaces_a_parameter(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post(ROUTES[0], json=body(chat_template_kwargs={name: True}))
    assert response.status_code == 400
    assert name in response.json()["error"]["message"]


async def test_deeply_nested_variables_are_refused(client: httpx.AsyncClient) -> None:
    value: Any = {}
    for _ in range(70):
        value = {"a": value}
    response = await client.post(ROUTES[0], json=body(chat_template_kwargs=value))
    assert response.json()["error"]["param"] == "chat_template_kwargs"


async def test_a_variable_with_half_of_a_surrogate_pair_is_refused(client: httpx.AsyncClient) -> None:
    content = b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": "\\ud83d"}}'
    response = await client.post(ROUTES[0], content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs.a")


async def test_tokenize_accepts_the_tools_of_a_conversation(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer
) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "strict": True}}]
    with_tools = (await client.post("/tokenize", json=body(tools=tools))).json()["tokens"]
    assert bytes(with_tools).decode() == "[tools]weather[user]hi[assistant]"
    answer = (await client.post(ROUTES[0], json=body(tools=tools, return_token_ids=True))).json()
    assert answer["choices"][0]["prompt_token_ids"] == with_tools


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% for d in documents or [] %}[{{ d.text }}]"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def real() -> Iterator[Tokenizer]:
    with closing(Tokenizer(AutoTokenizer.from_pretrained(MODEL_DIRECTORY))) as tokenizer:
        tokenizer._tokenizer.chat_template = TEMPLATE
        yield tokenizer


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (None, "<user>hi</><assistant>Sure,</><assistant>"),
        ({"add_generation_prompt": False}, "<user>hi</><assistant>Sure,</>"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "<user>hi</><assistant>Sure,"),
        ({"enable_thinking": False}, "<user>hi</><assistant>Sure,</><assistant><think></think>"),
        ({"documents": [{"text": "d"}]}, "<user>hi</><assistant>Sure,</>[d]<assistant>"),
    ],
)
async def test_a_real_template_uses_the_options(real: Tokenizer, options: dict[str, Any] | None, text: str) -> None:
    assert await real.render_chat(MESSAGES, options=options) == text


async def test_an_empty_last_message_can_be_continued(real: Tokenizer) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    turns = [MESSAGES[0], {"role": "assistant", "content": ""}]
    assert await real.render_chat(turns, options=options) == "<user>hi</><assistant>"
