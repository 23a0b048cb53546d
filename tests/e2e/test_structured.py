"""Structured output and tools from a whole server, as OpenAI's client asks for them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from server.demo.tour import MODEL_DIRECTORY
from tests.support.presence import present
from tests.support.serving import BASE, adapter, serving, upload

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.place }}{% endfor %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)
MESSAGES: list[Any] = [{"role": "user", "content": "My order 4471 never arrived"}]
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "place": {"$ref": "#/$defs/Place"}},
    "required": ["unit", "place"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "string", "maxLength": 6, "pattern": "^[a-z]*$"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


class Ticket(BaseModel):
    """The type of the answer; every field is bounded, because the small model may never end a value."""

    model_config = ConfigDict(extra="forbid")

    label: Literal["refund", "delivery", "other"]
    urgent: bool
    order: int = Field(ge=0, le=9999)


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("server")
    model = folder / "model"
    shutil.copytree(MODEL_DIRECTORY, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with serving(folder, "--dtype", "float32", "--max-num-seqs", "16", model=model) as (client, _):
        for task in ("intent", "dates"):
            assert upload(client, task, *adapter(task)).status_code == 201
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
            yield sdk


def test_a_pydantic_model_is_parsed(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model=BASE, messages=MESSAGES, response_format=Ticket, temperature=0, max_tokens=200
    )
    message = answer.choices[0].message
    assert isinstance(message.parsed, Ticket)
    assert answer.choices[0].finish_reason == "stop"
    assert list(json.loads(str(message.content))) == ["label", "urgent", "order"]


@pytest.mark.parametrize("model", [BASE, "intent"])
def test_answers_match_choices_and_regexes(sdk: openai.OpenAI, model: str) -> None:
    def ask(**structure: Any) -> list[str]:
        answer = sdk.completions.create(
            model=model,
            prompt="when can you deliver the blue lamp?",
            temperature=1.5,
            seed=3,
            n=4,
            max_tokens=60,
            extra_body={"structured_outputs": structure},
        )
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        return [choice.text for choice in answer.choices]

    assert set(ask(choice=["refund", "delivery", "other, or none"])) <= {"refund", "delivery", "other, or none"}
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) for text in ask(regex=r"\d{4}-\d{2}-\d{2}"))
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}
    for text in ask(json=json.dumps(schema)):
        jsonschema.validate(json.loads(text), schema)
    assert all(re.fullmatch("x[12]{3}", text) for text in ask(grammar='start: "x" item{3}\nitem: "1" | "2"'))


def test_a_constrained_stream_runs_beside_unconstrained_requests(sdk: openai.OpenAI) -> None:
    def free() -> str:
        return sdk.completions.create(model="dates", prompt="the 3rd of May 2021", temperature=0).choices[0].text

    def constrained(seed: int) -> str:
        chunks: Any = sdk.chat.completions.create(
            model=BASE,
            messages=MESSAGES,
            stream=True,
            seed=seed,
            max_tokens=80,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "t", "schema": Ticket.model_json_schema()},
            },
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = free()
    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(constrained, seed) for seed in range(4)]
        assert {future.result() for future in [pool.submit(free) for _ in range(4)]} == {alone}
        for text in texts:
            Ticket.model_validate_json(text.result())
    assert constrained(0) == texts[0].result()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 1}}, "minLength"),
        ({"json": {"uniqueItems": True}}, "uniqueItems"),
        ({"grammar": 'start: a\na: a "x"'}, "no token"),
    ],
)
def test_a_constraint_that_cannot_be_compiled_is_a_400(
    sdk: openai.OpenAI, structure: dict[str, object], reason: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as error:
        sdk.completions.create(model=BASE, prompt="x", stream=stream, extra_body={"structured_outputs": structure})
    assert error.value.param == "structured_outputs"


def test_a_chain_of_rules_does_not_take_the_server_down(sdk: openai.OpenAI) -> None:
    grammar = "start: r0\n" + "\n".join(f'r{i}: r{i + 1}|"a"' for i in range(3900)) + '\nr3900: "b"'
    with pytest.raises(openai.BadRequestError):
        sdk.completions.create(model=BASE, prompt="x", extra_body={"structured_outputs": {"grammar": grammar}})
    answer = sdk.completions.create(model=BASE, prompt="x", max_tokens=1)
    assert present(answer.usage).completion_tokens == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_follow_the_schema(sdk: openai.OpenAI, choice: object) -> None:
    def check(name: str, arguments: str) -> None:
        assert name in {"weather", "now"}
        jsonschema.validate(json.loads(arguments), PARAMETERS if name == "weather" else {"type": "object"})

    ask: dict[str, Any] = {
        "model": BASE,
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "seed": 1,
        "max_tokens": 80,
    }
    answer: Any = sdk.chat.completions.create(**ask).choices[0]
    (call,) = answer.message.tool_calls
    check(call.function.name, call.function.arguments)
    assert answer.message.content is None
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    name, arguments = "", ""
    chunks: Any = sdk.chat.completions.create(**ask, stream=True)
    for chunk in chunks:
        for piece in chunk.choices[0].delta.tool_calls or []:
            name += piece.function.name or ""
            arguments += piece.function.arguments
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_tools_and_their_answers_reach_the_template(sdk: openai.OpenAI) -> None:
    def count(**fields: Any) -> int:
        ask: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 1} | fields
        answer: Any = sdk.chat.completions.create(**ask)
        return int(answer.usage.prompt_tokens)

    assert count(tools=TOOLS) > count(tools=TOOLS, tool_choice="none") == count()
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"place": "bonn"}'}}
    more = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "rain"}]
    without = [{"role": "assistant", "content": ""}, more[1]]
    assert count(messages=MESSAGES + more) > count(messages=MESSAGES + without)


def test_the_embedded_template_shows_no_tools_and_forced_calls_work_all_the_same(demo_server: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none", max_retries=0) as sdk:
        ask: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 80}
        with pytest.raises(openai.BadRequestError, match="does not support tools") as error:
            sdk.chat.completions.create(**ask)
        assert error.value.param == "tools"
        assert sdk.chat.completions.create(**ask, tool_choice="required").choices[0].message.tool_calls
