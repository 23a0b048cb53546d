"""Answers that follow a schema and forced tool calls, in each client's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.documents import example, expected_output
from tests.clients.running import ClientEnvironment, heldout
from tests.support.serving import BASE

LABELS = {"positive", "negative"}
TEXT = heldout("sentiment")[0]["input"]
by_either_name = pytest.mark.parametrize(
    "named",
    [{"model": "sentiment"}, {"model": BASE, "extra_body": {"prompt_id": "sentiment"}}],
    ids=["model", "prompt_id"],
)


class Verdict(BaseModel):
    """The sentiment of a review."""

    label: Literal["positive", "negative"]


@pytest.fixture
def sdk(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 64}


@by_either_name
def test_openai_python_parses_the_answer(sdk: openai.OpenAI, named: dict[str, Any], ask: dict[str, Any]) -> None:
    message: Any = sdk.chat.completions.parse(**named, **ask, response_format=Verdict).choices[0].message
    assert message.parsed.label in LABELS
    with sdk.chat.completions.stream(**named, **ask, response_format=Verdict) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == message.parsed


@by_either_name
def test_openai_python_parses_the_arguments_of_a_forced_call(
    sdk: openai.OpenAI, named: dict[str, Any], ask: dict[str, Any]
) -> None:
    forced: dict[str, Any] = {
        "tools": [openai.pydantic_function_tool(Verdict)],
        "tool_choice": {"type": "function", "function": {"name": "Verdict"}},
    }
    parsed: Any = sdk.chat.completions.parse(**named, **ask, **forced)
    (call,) = parsed.choices[0].message.tool_calls
    assert call.function.name == "Verdict"
    assert call.function.parsed_arguments.label in LABELS
    with sdk.chat.completions.stream(**named, **ask, **forced) as stream:
        final: Any = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_openai_node_parses_answers_and_calls(server: str, node_clients: ClientEnvironment) -> None:
    results = node_clients.json(
        "openai_node_structured.mjs", f"{server}/v1", {"model": BASE, "prompt_id": "sentiment"}, TEXT
    )
    assert results["parsed"]["label"] in LABELS
    assert results["streamed"] == results["parsed"]
    assert results["toolName"] == "Verdict"
    assert results["toolArguments"]["label"] in LABELS


@by_either_name
def test_langchain_parses_answers_and_calls(
    server: str, python_clients: ClientEnvironment, named: dict[str, Any]
) -> None:
    results = python_clients.json("langchain_structured.py", f"{server}/v1", named, TEXT)
    assert {results["json_schema"], results["function_calling"]} <= LABELS
    (call,) = results["tool_calls"]
    assert call["name"] == "Verdict"
    assert call["args"]["label"] in LABELS


@by_either_name
def test_instructor_parses_answers_in_both_modes(
    server: str, python_clients: ClientEnvironment, named: dict[str, Any]
) -> None:
    results = python_clients.json("instructor_client.py", f"{server}/v1", named, TEXT)
    assert len(results) == 4
    assert set(results.values()) <= LABELS


def test_the_documented_example_of_instructor_runs(server: str, python_clients: ClientEnvironment) -> None:
    program = example("Instructor", "python", server)
    assert python_clients.run(program).splitlines() == expected_output(program)
