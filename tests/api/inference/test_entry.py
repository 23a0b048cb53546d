"""Limits, permits and sizes are checked before any work, on every route that does some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.errors import EngineNotReadyError
from tests.support.api_fixtures import CountingStore, UploadParts
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry
from tests.support.operations import OPERATIONS

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("still_clock")]

KEYS = "".join(
    [
        key_entry("one", tenant="t", requests_per_minute=1),
        key_entry("poor", tenant="t", requests_per_minute=1000, tokens_per_minute=100),
        key_entry("free", tenant="t"),
    ]
)

TEXT = "x" * 90

GENERATING = [
    ("/v1/completions", {"prompt": TEXT, "max_tokens": 50}),
    ("/v1/completions", {"prompt": TEXT, "max_tokens": 50, "stream": True}),
    ("/v1/completions", {"prompt": TEXT, "max_tokens": 25, "model": ["a", "b"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 50}),
    ("/v1/classify", {"input": TEXT, "labels": ["a" * 30, "b" * 30]}),
]


@pytest.fixture
async def prompts(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    for seed, name in enumerate(("a", "b")):
        response = await client.post("/v1/prompts", headers=bearer("free"), **upload_parts(name, seed=seed))
        assert response.status_code == 201


@pytest.fixture
def no_work(tokenizer: ByteTokenizer, store: CountingStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to forbid tokenising, rendering, lookups and reading from then on."""

    async def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done for a request that is over its limit")

    def look(*_: object) -> None:
        raise AssertionError("the store was asked for a request that is over its limit")

    def forbid() -> None:
        monkeypatch.setattr(tokenizer, "encode", work)
        monkeypatch.setattr(tokenizer, "render_chat", work)
        for name in ("lease", "resolve", "publish", "upload"):
            monkeypatch.setattr(store, name, look, raising=False)

    return forbid


LIMITED = [route for route, operation in OPERATIONS.by_route.items() if operation.quota is not None]


def test_expensive_operations_are_limited() -> None:
    # The others read the catalog or write a row to it, or a bounded number of them (the metrics of a training run);
    # logins have a limit of their own.
    cheap = ("/rollback", "/restore", "/prune", "/cancel", "/session", "/metrics")
    posts = {path for method, path in OPERATIONS.by_route if method == "POST" and not path.endswith(cheap)}
    assert {path for _, path in LIMITED} == posts | {"/v1/prompts/{id}/inspect", "/v1/prompts/{id}/diff"}


@pytest.mark.parametrize(("method", "path"), LIMITED)
async def test_no_work_is_done_for_a_key_at_its_limit(
    client: httpx.AsyncClient, prompts: None, no_work: Callable[[], None], engine: FakeEngine, method: str, path: str
) -> None:
    assert (await client.post("/tokenize", json={"prompt": "x"}, headers=bearer("one"))).status_code == 200
    no_work()
    asked = len(engine.requests)
    headers = bearer("one") | {"content-type": "application/json"}
    # The body is invalid: reading it would give a 400.
    response = await client.request(method, path.replace("{id}", "a"), content=b"{", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(response.headers["retry-after-ms"]) > 0
    assert (len(engine.requests), engine.prepared, engine.inspected) == (asked, [], [])


@pytest.mark.parametrize(("path", "body"), GENERATING)
async def test_refused_requests_pay_for_tokenised_text(
    client: httpx.AsyncClient, prompts: None, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    response = await client.post(path, json=body, headers=bearer("poor"))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded"), response.text
    assert int(response.headers["x-ratelimit-remaining-tokens"]) <= 10
    assert response.headers["x-ratelimit-remaining-requests"] == "999"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["x"] * 30, "max_tokens": 4}),
        ("/v1/completions", {"prompt": [1] * 60, "model": ["a", "b"]}),
        ("/v1/completions", {"prompt": "x", "n": 4, "max_tokens": 30}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 101}),
        ("/v1/classify", {"input": ["x"] * 30, "labels": ["a", "b", "c", "d"]}),
        ("/detokenize", {"tokens": [1] * 101}),
    ],
)
async def test_a_request_over_the_keys_total_limit_is_refused_before_any_work_and_costs_nothing(
    client: httpx.AsyncClient, prompts: None, no_work: Callable[[], None], path: str, body: dict[str, Any]
) -> None:
    no_work()
    response = await client.post(path, json=body, headers=bearer("poor"))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded"), response.text
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-ratelimit-remaining-tokens"] == "100"
    assert response.headers["x-ratelimit-remaining-requests"] == "1000"


async def test_a_text_likely_over_the_remaining_tokens_is_refused_with_a_retry(
    client: httpx.AsyncClient, prompts: None, no_work: Callable[[], None]
) -> None:
    spend = {"prompt": "x" * 60}
    assert (await client.post("/tokenize", json=spend, headers=bearer("poor"))).status_code == 200
    no_work()
    response = await client.post("/tokenize", json={"prompt": "x" * 400}, headers=bearer("poor"))
    assert response.status_code == 429
    assert "x-should-retry" not in response.headers
    assert response.headers["x-ratelimit-remaining-tokens"] == "39"


async def test_tokenizer_routes_are_charged_for_their_tokens(client: httpx.AsyncClient, prompts: None) -> None:
    for path, body in (
        ("/tokenize", {"prompt": "x" * 29}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 7}]}),
        ("/detokenize", {"tokens": [65] * 30}),
    ):
        assert (await client.post(path, json=body, headers=bearer("poor"))).status_code == 200
    response = await client.post("/tokenize", json={"prompt": "x"}, headers=bearer("poor"))
    assert response.headers["x-ratelimit-remaining-tokens"] == str(100 - 30 - 24 - 30 - 2)
    owed = await client.post("/tokenize", json={"prompt": "x" * 60}, headers=bearer("poor"))
    assert owed.status_code == 200
    refused = await client.post("/tokenize", json={"prompt": "x"}, headers=bearer("poor"))
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-tokens"]) == (429, "0")
    assert "none now" in refused.json()["error"]["message"]
    # Requests without tokens do not wait for the key's token debt.
    assert (await client.get("/v1/prompts/a/inspect", headers=bearer("poor"))).status_code == 200


async def test_refusals_of_a_full_server_are_not_charged(
    app: FastAPI, client: httpx.AsyncClient, prompts: None, engine: FakeEngine
) -> None:
    services = app.state.services
    with services.admission.permits(services.admission.capacity):
        for method, path, body in (
            ("POST", "/v1/completions", {"prompt": "x"}),
            ("POST", "/tokenize", {"prompt": "x"}),
            ("POST", "/detokenize", {"tokens": [1]}),
            ("GET", "/v1/prompts/a/inspect", None),
            ("POST", "/v1/prompts/a/warm", {}),
        ):
            response = await client.request(method, path, json=body, headers=bearer("one"))
            assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded"), path
            assert response.headers["x-ratelimit-remaining-requests"] == "1"
    engine.prepare_failure = EngineNotReadyError("it drains")
    assert (await client.post("/v1/prompts/a/warm", headers=bearer("one"))).status_code == 503
    bad = await client.post("/v1/completions", json={"prompt": ""}, headers=bearer("one"))
    assert (bad.status_code, bad.headers["x-ratelimit-remaining-requests"]) == (400, "0")


@pytest.mark.parametrize(
    ("path", "field", "texts"),
    [
        ("/v1/completions", "prompt", lambda text: {"prompt": text}),
        ("/v1/classify", "input", lambda text: {"input": ["x", text], "labels": ["a", "b"]}),
        ("/v1/chat/completions", "messages", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ],
)
async def test_a_text_longer_than_any_context_is_not_tokenised(
    client: httpx.AsyncClient,
    prompts: None,
    no_work: Callable[[], None],
    path: str,
    field: str,
    texts: Callable[..., Any],
) -> None:
    no_work()
    response = await client.post(path, json=texts("x" * (256 * 128 + 1)), headers=bearer("free"))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    assert "at most 32768 characters" in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/classify"])
async def test_texts_have_a_total_size_limit(
    client: httpx.AsyncClient, prompts: None, no_work: Callable[[], None], path: str
) -> None:
    no_work()
    texts = ["x" * 12_000] * 3
    body = {"prompt": texts} if path.endswith("completions") else {"input": texts, "labels": ["a"]}
    response = await client.post(path, json=body, headers=bearer("free"))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (413, "payload_too_large")
    assert error["param"] == ("prompt" if path.endswith("completions") else "input")
    assert "36000 characters together, and at most 32768" in error["message"]


async def test_a_long_text_may_be_sent_to_tokenize(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "x" * 30_000}] * 2
    response = await client.post("/tokenize", json={"messages": messages}, headers=bearer("free"))
    assert response.status_code == 200


async def test_messages_to_tokenise_have_a_total_size_limit(
    client: httpx.AsyncClient, no_work: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.tokenization.routes.MAX_TEXT_CHARS", 50_000)
    no_work()
    messages = [{"role": "user", "content": "x" * 30_000}] * 2
    response = await client.post("/tokenize", json={"messages": messages}, headers=bearer("free"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


async def test_text_added_by_a_template_counts_towards_the_limit(
    client: httpx.AsyncClient, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(*_: object, **__: object) -> None:
        raise AssertionError("a text that is too long was tokenised")

    monkeypatch.setattr("server.api.tokenization.routes.MAX_TEXT_CHARS", 100)
    tools = [
        {"type": "function", "function": {"name": "f" * 60}},
        {"type": "function", "function": {"name": "g" * 60}},
    ]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools}
    assert (
        await client.post("/tokenize", json=body | {"tools": tools[:1]}, headers=bearer("free"))
    ).status_code == 200
    monkeypatch.setattr(tokenizer, "encode", encode)
    response = await client.post("/tokenize", json=body, headers=bearer("free"))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert "at most 100 are allowed" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["x"] * 9}, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 3, "n": 3}, "n"),
        ("/v1/completions", {"prompt": ["x"] * 5, "model": ["a", "b"]}, "prompt"),
        ("/v1/classify", {"input": ["x"] * 3, "labels": ["a", "b", "c"]}, "input"),
    ],
)
async def test_a_request_with_more_sequences_than_permits_is_refused_before_any_work(
    client: httpx.AsyncClient, prompts: None, no_work: Callable[[], None], path: str, body: dict[str, Any], param: str
) -> None:
    no_work()
    response = await client.post(path, json=body, headers=bearer("free"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_permits_are_released(
    app: FastAPI, client: httpx.AsyncClient, prompts: None, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(*_: object, **__: object) -> None:
        assert app.state.services.admission.num_in_use == 2
        raise EngineNotReadyError("it drains")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", encode)
        body = {"prompt": ["x", "y"]}
        assert (await client.post("/v1/completions", json=body, headers=bearer("one"))).status_code == 503
    assert app.state.services.admission.num_in_use == 0
    assert (await client.post("/v1/completions", json={"prompt": "x"}, headers=bearer("one"))).status_code == 200
