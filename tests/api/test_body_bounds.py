"""Limits of bodies: the number of values, of a list's items, and of validated faults."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.json_budget import MOST_CONTAINERS, MOST_MEMBERS, MOST_TOKENS, MOST_VALUES, is_over, num_values
from server.config import Settings
from tests.support.api_fixtures import MakeApp
from tests.support.in_process import ready

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [1] * 4000}, "messages[0]"),
        ("/tokenize", {"messages": [{"role": "user"}] * 2000}, "messages[0].content"),
        ("/detokenize", {"tokens": ["a"] * 10_000}, "tokens[0]"),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": ["a"] * 100}, "stop_token_ids[0]"),
        (
            "/v1/completions",
            {"prompt": "x", "structured_outputs": {"choice": [1] * 1000}},
            "structured_outputs.choice[0]",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [1] * 100}, "tools[0]"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [1] * 100}]},
            "messages[0].tool_calls[0]",
        ),
    ],
)
async def test_validation_stops_at_the_first_fault_of_a_list(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert len(error["details"]) <= 2


CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}


def calls(count: int, **function: Any) -> list[dict[str, object]]:
    call = CALL | {"function": {"name": "f", "arguments": "{}"} | function}
    return [{"role": "assistant", "tool_calls": [call] * 64} for _ in range(count)]


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/v1/completions", {"prompt": ["x"] * 16_385}, "prompt", "at most 16384 texts"),
        ("/v1/classify", {"input": [[1]] * 16_385, "labels": ["a"]}, "input", "at most 16384 texts"),
        ("/v1/completions", {"prompt": "x", "stop": [1] * 17}, "stop", "at most 16 strings"),
        ("/v1/classify", {"input": "x", "labels": [1] * 257}, "labels", "1 to 256 labels"),
        ("/v1/completions", {"prompt": "x", "model": [1] * 17}, "model", "2 to 16 members"),
        ("/v1/chat/completions", {"messages": [1] * 4097}, "messages", "at most 4096 messages"),
        ("/tokenize", {"messages": [1] * 4097}, "messages", "at most 4096 messages"),
        ("/tokenize", {"messages": calls(65)}, "messages", "at most 4096 calls together"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 4097}]},
            "messages[0].content",
            "at most 4096 text parts",
        ),
        (
            "/tokenize",
            {"messages": calls(1, arguments='{"a":[' + "1," * 600 + "1]}")},
            "messages",
            "at most 32768 values in arguments",
        ),
        (
            "/tokenize",
            {"messages": calls(1, arguments='{"a":"' + "x" * 17_000 + '"}')},
            "messages",
            "at most 1048576 characters of arguments",
        ),
    ],
)
async def test_lists_are_limited_before_their_items_are_validated(
    serve_large: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    response = await serve_large.post(path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


@pytest.fixture
async def serve_large(make_app: MakeApp, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that takes bodies of 8 MiB."""
    app = make_app(replace(settings, http=replace(settings.http, max_body_bytes=8 * 1024 * 1024)))
    async with ready(app) as http:
        yield http


@pytest.mark.parametrize(
    ("path", "most"), [("/v1/completions", MOST_TOKENS), ("/detokenize", MOST_TOKENS), ("/tokenize", MOST_VALUES)]
)
async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    serve_large: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, most: int
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("the body was parsed")

    headers = {"content-type": "application/json"}
    for content in (
        b"[" + b"1," * most + b"1]",
        b'{"x": [' + b"{}," * most + b"1]}",
        b'{"x": {' + b'"a":"",' * most + b'"b":1}}',
        b"[" + b"[]," * MOST_CONTAINERS + b"1]",
        b'{"":[],' * (MOST_CONTAINERS // 2 + 1) + b'"":1' + b"}" * (MOST_CONTAINERS // 2 + 1),
        b"{" + b'"a":1,' * MOST_MEMBERS + b'"b":1}',
        b'{"x": [' + b'"\\",",' * (most // 2) + b"[],[],1" + b",[]" * (most // 2) + b"]}",
    ):
        with monkeypatch.context() as patch:
            patch.setattr("starlette.requests.json.loads", loads)
            response = await serve_large.post(path, content=content, headers=headers)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (413, "payload_too_large"), content[:20]
        assert f"more than {most} JSON values" in error["message"]
    text = "a,b[{:" * 100_000  # commas in a string are not values
    response = await serve_large.post(
        path, json={"prompt": 5, "tokens": "x", "user": text, "note": '"' + text + "\\"}
    )
    assert response.status_code == 400


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a,[{"\\]}:é')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('a,[{"\\')), inner),
    max_leaves=60,
)


def count_values(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(count_values, value.values()))
    return 1 + (sum(map(count_values, value)) if isinstance(value, list) else 0)


@given(value=JSON_VALUES, most=st.integers(1, 40), ascii_only=st.booleans())
def test_counting_values_in_the_bytes_never_counts_too_few(value: Any, most: int, ascii_only: bool) -> None:
    """The count is never too low; only empty lists or objects and some strings make it too high."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    found = num_values(body, most)
    assert found > most or found >= count_values(value)
    large = num_values(body, 10**6)
    assert large >= count_values(value)
    if not any(character in body for character in b'"'):
        assert large <= 2 * count_values(value)


@given(value=JSON_VALUES, most=st.integers(1, 40), ascii_only=st.booleans())
def test_accepted_bodies_are_within_the_limit_of_values(value: Any, most: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert is_over(body, most) or count_values(value) <= most
    assert not is_over(body, 10**6)


def test_commas_in_a_string_are_not_counted() -> None:
    body = json.dumps({"a": 'x,y"[{\\' * 1000, "b": [1, 2, 3], "c\\,": {}}).encode()
    assert num_values(body, 20) == 8
