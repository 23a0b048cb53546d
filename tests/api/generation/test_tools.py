from __future__ import annotations

import json
import random
from typing import Any
from unittest import mock

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.files.strict_json import refuse_constant
from server.api.generation.tool_calls import (
    CallArguments,
    CallStart,
    HermesReader,
    NamedCallReader,
    RequiredCallReader,
    Text,
    ToolCallReader,
)
from server.api.generation.tools import Tool, forced_constraint
from server.errors import ConstraintError, InvalidRequestError
from tests.support.byte_tokenizer import BOS, EOS, ByteTokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.presence import present

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "$defs": {"City": {"type": "string"}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "strict": True}}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER, TIME]} | fields


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json=body(**fields))
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def stream(client: httpx.AsyncClient, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """All deltas except the first (the role) and the last (empty), and the finish reason."""
    response = await client.post(URL, json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    return [choice["delta"] for choice in choices[1:-1]], choices[-1]["finish_reason"]


def check_streamed_call(deltas: list[dict[str, Any]], name: str, arguments: str) -> None:
    calls = [delta["tool_calls"][0] for delta in deltas]
    assert calls[0]["id"].startswith("call_")
    assert (calls[0]["index"], calls[0]["type"]) == (0, "function")
    assert calls[0]["function"] == {"name": name, "arguments": ""}
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == arguments


async def test_a_named_function_is_called(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: ByteTokenizer
) -> None:
    engine.reply = '{"city": "Bonn"}'
    choice = await ask(client, tool_choice=NAMED)
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == (None, "stop")
    assert message["tool_calls"][0].pop("id").startswith("call_")
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    ]
    constraint = present(engine.requests[0].params.constraint)
    assert json.loads(constraint.text) == PARAMETERS | {"additionalProperties": False}
    assert constraint.is_lenient
    assert [tool["function"]["name"] for tool in tokenizer.tools] == ["weather", "time"]
    deltas, reason = await stream(client, tool_choice=NAMED)
    check_streamed_call(deltas, "weather", engine.reply)
    assert len(deltas) == len(engine.reply) + 1
    assert reason == "stop"


async def test_a_function_without_parameters_accepts_none(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "{}"
    choice = await ask(client, tool_choice={"type": "function", "function": {"name": "time"}})
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}
    constraint = present(engine.requests[0].params.constraint)
    assert not constraint.is_lenient
    assert json.loads(constraint.text) == {"type": "object", "properties": {}, "additionalProperties": False}


async def test_required_forces_a_call_of_any_function(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = '{"name": "weather", "arguments": {"city": "a}"}}'
    choice = await ask(client, tool_choice="required")
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "a}"}'}
    schema = json.loads(present(engine.requests[0].params.constraint).text)
    assert schema["$defs"]["weather"] == PARAMETERS | {"additionalProperties": False, "$id": "prelude://tool0/schema"}
    assert [option["properties"]["name"] for option in schema["anyOf"]] == [{"const": "weather"}, {"const": "time"}]
    deltas, reason = await stream(client, tool_choice="required")
    check_streamed_call(deltas, "weather", '{"city": "a}"}')
    assert reason == "tool_calls"


async def test_functions_with_conflicting_definitions_cannot_be_required(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    def tool(name: str, inner: dict[str, Any]) -> dict[str, Any]:
        parameters = {"$id": "https://example.com/a", "$defs": {"x": {"$id": "https://example.com/x"} | inner}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    first, same, other = tool("f", {"type": "null"}), tool("g", {"type": "null"}), tool("h", {"type": "string"})
    for choice in ("required", "auto"):
        assert (await client.post(URL, json=body(tools=[first, same], tool_choice=choice))).status_code == 200
    response = await client.post(URL, json=body(tools=[first, other], tool_choice="required"))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools")
    assert "'https://example.com/x'" in error["message"]


async def test_a_truncated_call_ends_with_length(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = '{"name": "weather", "arguments": {"city": "Bonn"}}'
    choice = await ask(client, tool_choice="required", max_tokens=44)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "B'
    choice = await ask(client, tool_choice="required", max_tokens=12)
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"name": "we', "length")


async def test_with_auto_the_model_may_call_a_function(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: ByteTokenizer
) -> None:
    engine.reply = f"Let me see.\n{CALL}\n{CALL}"
    choice = await ask(client)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"city": "Köln"}'] * 2
    assert engine.requests[0].params.constraint is None
    assert "strict" not in tokenizer.tools[1]["function"]
    one = await ask(client, parallel_tool_calls=False)
    assert len(one["message"]["tool_calls"]) == 1
    engine.reply = CALL
    choice = await ask(client, tool_choice="auto", n=2, logprobs=True)
    assert choice["message"]["content"] is None
    assert len(choice["logprobs"]["content"]) == len(CALL.encode()) + 1
    deltas, reason = await stream(client)
    check_streamed_call(deltas, "weather", '{"city": "Köln"}')
    assert reason == "tool_calls"


async def test_calls_marked_by_special_tokens_are_parsed(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: ByteTokenizer
) -> None:
    tokenizer.special_tokens = {BOS: "<tool_call>", EOS: "</s>"}
    call = CALL.removeprefix("<tool_call>")
    engine.reply = mock.Mock(encode=lambda: [BOS, *call.encode()])
    choice = await ask(client)
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    choice = await ask(client, tool_choice="none")
    assert choice["message"]["content"] == call


async def test_a_stream_with_tools_returns_every_token_once(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = CALL
    response = await client.post(URL, json=body(stream=True, return_token_ids=True, logprobs=True))
    choices = [
        json.loads(event.removeprefix("data: "))["choices"][0] for event in response.text.strip().split("\n\n")[:-1]
    ]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == [*CALL.encode(), 257]
    scored = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert len(scored) == len(CALL.encode()) + 1


async def test_an_answer_without_a_call_is_text(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: ByteTokenizer
) -> None:
    choice = await ask(client)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hello world", "stop")
    assert "tool_calls" not in choice["message"]
    engine.reply = CALL
    choice = await ask(client, tool_choice="none")
    assert choice["message"]["content"] == CALL
    assert tokenizer.tools == []


async def test_a_template_without_tools_refuses_auto(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer, engine: FakeEngine
) -> None:
    tokenizer.shows_tools = False
    for fields in ({}, {"tool_choice": "auto"}):
        response = await client.post(URL, json=body(**fields))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
    assert engine.requests == []
    engine.reply = '{"name": "time", "arguments": {}}'
    # A forced call needs no template: clients use it for structured output.
    assert (await ask(client, tool_choice="required"))["message"]["tool_calls"]
    assert (await ask(client, tool_choice=NAMED))["message"]["tool_calls"]
    assert (await ask(client, tool_choice="none"))["message"]["content"]
    assert (await ask(client, tools=[], tool_choice="auto"))["message"]["content"]


async def test_messages_with_calls_reach_the_template(client: httpx.AsyncClient, tokenizer: ByteTokenizer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    empty = {"id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}}
    messages = [
        {"role": "user", "content": "x", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [call, empty]},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "c1"},
        {"role": "assistant", "content": "Rain.", "tool_calls": None},
    ]
    await ask(client, messages=messages)
    assert tokenizer.turns == [
        {"role": "user", "content": "x", "name": "Ada"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                call | {"function": {"name": "weather", "arguments": {"city": "Bonn"}}},
                empty | {"function": {"name": "time", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Rain."},
    ]


async def test_arguments_may_be_an_object_and_content_may_be_missing(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "content": None, "tool_call_id": "c1"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "reasoning_content": "hm"},
    ]
    await ask(client, messages=messages)
    assert tokenizer.turns == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "reasoning": "hm", "reasoning_content": "hm"},
    ]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def assistant(**call: Any) -> dict[str, Any]:
    own = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}} | call
    return {"messages": [{"role": "assistant", "tool_calls": [own]}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (function(name=""), "tools[0].function.name"),
        (function(name="a b"), "tools[0].function.name"),
        (function(name="a" * 65), "tools[0].function.name"),
        (function(description=5), "tools[0].function.description"),
        (function(parameters=[]), "tools[0].function.parameters"),
        (function(parameters={"multipleOf": 1e6 + 3}), "tools[0].function.parameters"),
        (function(strict="yes"), "tools[0].function.strict"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": NAMED, "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": assistant()["messages"][0]["tool_calls"]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "developer"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages.function_call"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages.audio"),
        ({"messages": [{"role": "assistant", "content": "x", "reasoning": 5}]}, "messages[0].reasoning"),
        (assistant(type="custom"), "messages[0].tool_calls[0].type"),
        (assistant(id=None), "messages[0].tool_calls[0].id"),
        (assistant(function={"name": "f", "arguments": 5}), "messages[0].tool_calls[0].function.arguments"),
        (assistant(function={"name": "f", "arguments": [1]}), "messages[0].tool_calls[0].function.arguments"),
        (
            assistant(function={"name": "f", "arguments": {"a": nested(70)}}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (assistant(function={"name": "f", "arguments": "[]"}), "messages[0].tool_calls[0].function.arguments"),
        (
            assistant(function={"name": "f", "arguments": '{"a":' * 9000}),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
async def test_bad_tools_and_messages_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json=body(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("choice", ["any", 5, {"type": "function"}, {"type": "function", "function": {"name": 1}}])
async def test_a_wrong_tool_choice_is_refused(client: httpx.AsyncClient, choice: str | int | dict[str, Any]) -> None:
    response = await client.post(URL, json=body(tool_choice=choice))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tool_choice")


async def test_required_tools_have_a_total_size_limit() -> None:
    functions = [{"name": f"f{i}", "parameters": {"const": "x" * 9000}} for i in range(9)]
    tools = [Tool.model_validate({"type": "function", "function": function}) for function in functions]
    assert forced_constraint(tools[:5], "required") is not None
    with pytest.raises(InvalidRequestError, match="tools: .* 65536 characters") as error:
        forced_constraint(tools, "required")
    assert error.value.param == "tools"


async def test_an_unusable_schema_is_an_error_of_tools(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure = ConstraintError("wrong type")
    response = await client.post(URL, json=body(tool_choice="required"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def read(
    reader: ToolCallReader, text: str, seed: int, reason: str = "stop"
) -> tuple[str, list[tuple[str, str]], str]:
    """Text, calls and finish reason after reading the text in random pieces."""
    rng = random.Random(seed)
    pieces = []
    while text:
        length = rng.randint(1, 9)
        pieces += reader.append(text[:length])
        text = text[length:]
    last, reason = reader.finish(reason)
    pieces += last
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[piece.index][1] += piece.text
    shown = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    return shown, [(name, arguments) for name, arguments in calls], reason


ARGUMENTS = '{"city": "Köln"}'


@pytest.mark.parametrize(
    ("text", "shown", "num_calls"),
    [
        ("", "", 0),
        ("plain  \n", "plain  \n", 0),
        (CALL, "", 1),
        (f" \n{CALL}\n", "", 1),
        (f"a {CALL}\n{CALL} b", "ab", 2),
        (CALL.removesuffix("</tool_call>"), "", 1),
        ("a <tool_call", "a <tool_call", 0),
        ("a <tool_call> b", "a <tool_call> b", 0),
        ("a <tool_call>{}</tool_call> b", "a <tool_call>{}</tool_call> b", 0),
        (CALL.replace("weather", "other"), CALL.replace("weather", "other"), 0),
        (CALL.replace(ARGUMENTS, "[]"), CALL.replace(ARGUMENTS, "[]"), 0),
        (CALL.replace(ARGUMENTS, "NaN"), CALL.replace(ARGUMENTS, "NaN"), 0),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", 0),
        (CALL.replace('"weather"', "[]"), CALL.replace('"weather"', "[]"), 0),
        (CALL.replace('"weather"', '{"a": 1}'), CALL.replace('"weather"', '{"a": 1}'), 0),
        (CALL.replace('"Köln"', "1e999"), CALL.replace('"Köln"', "1e999"), 0),
        (CALL.replace('"Köln"', "-Infinity"), CALL.replace('"Köln"', "-Infinity"), 0),
        (CALL.replace('"Köln"', "9" * 5000), CALL.replace('"Köln"', "9" * 5000), 0),
        (CALL.replace('"Köln"', "[" * 900 + "]" * 900), CALL.replace('"Köln"', "[" * 900 + "]" * 900), 0),
        (f"<tool_call>x</tool_call>{CALL}", "<tool_call>x</tool_call>", 1),
    ],
)
def test_hermes_calls_are_parsed(text: str, shown: str, num_calls: int) -> None:
    for seed in range(20):
        reader = HermesReader({"weather"}, allows_several=True)
        got, calls, reason = read(reader, text, seed)
        assert (got, calls) == (shown, [("weather", ARGUMENTS)] * num_calls)
        assert reason == ("tool_calls" if num_calls else "stop")
        assert read(HermesReader({"weather"}, allows_several=True), text, seed, "length")[2] == "length"


parts = st.lists(st.sampled_from(["<", "tool_call", ">", "/", " ", "{", '"name"', "a", "\n"]))


@given(parts.map("".join), st.integers(0, 99))
def test_text_without_calls_is_unchanged(text: str, seed: int) -> None:
    assert read(HermesReader({"f"}, allows_several=True), text, seed) == (text, [], "stop")


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (r'{"a": "\ud83d\ude00"}', '{"a": "\U0001f600"}'),
        (r'{"a": "b\ud83d c"}', '{"a": "b\ufffd c"}'),
        (r'{"\ude00": "\ude00\ud83d"}', '{"\ufffd": "\ufffd\ufffd"}'),
        ('{"a": 1, "a": 2}', '{"a": 2}'),
        ('{"a": 1e308, "b": 1e-999}', '{"a": 1e+308, "b": 0.0}'),
    ],
)
async def test_arguments_are_valid_json(
    client: httpx.AsyncClient, engine: FakeEngine, written: str, arguments: str
) -> None:
    engine.reply = f'<tool_call>{{"name": "weather", "arguments": {written}}}</tool_call>'
    choice = await ask(client)
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": arguments}
    deltas, reason = await stream(client)
    check_streamed_call(deltas, "weather", arguments)
    assert reason == choice["finish_reason"] == "tool_calls"


fragments = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<tool_", "\n", " ", "x", "{", "}", "[", "]", '"', ":", ", ",
        '{"name": "f", "arguments": ', '{"a": ', "}}", '"name": ', '"arguments": ', '"f"', '"g"', "1e999", "-1e999",
        "NaN", "Infinity", "9" * 4400, "[" * 300, "]" * 300, r'"\ud83d"', r'"\ude00\ud83d"', "null", "1.5", "\u2028",
    ]
)  # fmt: skip
calls_like = st.lists(fragments, max_size=12).map("".join)
bodies = st.one_of(
    calls_like,
    calls_like.map(lambda text: f"<tool_call>{text}</tool_call>"),
    calls_like.map(lambda text: f'a <tool_call>{{"name": "f", "arguments": {{"a": {text}}}}}</tool_call>'),
    st.recursive(
        st.one_of(st.text(st.characters()), st.integers(), st.floats(), st.none()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    ).map(lambda value: f'<tool_call>{{"name": "f", "arguments": {{"a": {json.dumps(value)}}}}}</tool_call>'),
    st.recursive(st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(
        lambda value: f'<tool_call>{{"name": {json.dumps(value)}, "arguments": {{}}}}</tool_call>'
    ),
)


@pytest.mark.slow
@given(bodies, st.sampled_from(["stop", "length"]), st.booleans(), st.integers(0, 99))
def test_any_output_becomes_the_same_text_and_calls_streamed_or_not(
    text: str, reason: str, allows_several: bool, seed: int
) -> None:
    whole = HermesReader({"f"}, allows_several=allows_several)
    pieces = whole.append(text)
    rest, ended = whole.finish(reason)
    shown, calls = "", []
    for piece in pieces + rest:
        if isinstance(piece, Text):
            shown += piece.text
        elif isinstance(piece, CallArguments):
            calls.append(("f", piece.text))
    assert read(HermesReader({"f"}, allows_several=allows_several), text, seed, reason) == (shown, calls, ended)
    shown.encode()
    for _, arguments in calls:
        assert isinstance(json.loads(arguments.encode(), parse_constant=refuse_constant), dict)


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()), st.integers(0, 99))
def test_forced_calls_are_parsed_unchanged(arguments: dict[str, Any], seed: int) -> None:
    text = json.dumps(arguments)
    assert read(NamedCallReader("f"), text, seed) == ("", [("f", text)], "stop")
    whole = json.dumps({"name": "f", "arguments": arguments})
    assert read(RequiredCallReader(), whole, seed) == ("", [("f", text)], "tool_calls")
    if "<tool_call>" not in text and "</tool_call>" not in text:  # a mark in a text looks like a real one
        hermes = f"<tool_call>{whole}</tool_call>"
        _, ((name, got),), _ = read(HermesReader({"f"}, allows_several=False), hermes, seed)
        assert (name, json.loads(got)) == ("f", arguments)
