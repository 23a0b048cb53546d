"""Tenants, priorities and timeouts reach the engine; a timeout is a 503."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.config import Settings
from server.errors import WaitTimeoutError
from tests.support.api_fixtures import MakeApp
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(make_app: MakeApp, settings: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> FastAPI:
    """An application, with two keys or a maximum wait if a test requests the fixture."""
    http = settings.http
    if "keys" in request.fixturenames:
        path = tmp_path / "keys"
        path.write_text("first\nsecond\n")
        http = replace(http, api_key_file=path)
    if "max_wait" in request.fixturenames:
        http = replace(http, max_wait_seconds=30.0)
    return make_app(replace(settings, http=http))


@pytest.fixture
def keys() -> list[str]:
    return [f"key-{hashlib.sha256(key).hexdigest()[:12]}" for key in (b"first", b"second")]


@pytest.fixture
def max_wait() -> float:
    return 30.0


async def test_priority_and_timeout_are_optional(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for fields in ({}, {"priority": None, "timeout": None}):
        assert (await client.post("/v1/completions", json={"prompt": "a"} | fields)).status_code == 200
        request = engine.requests[-1]
        assert (request.salt, request.priority, request.timeout) == ("", 0, None)


async def test_priority_and_timeout_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "priority": -100, "timeout": 5}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": ["a", "b"], "priority": 100})).status_code == 200
    assert [(request.priority, request.timeout) for request in engine.requests] == [(-100, 5.0), *[(100, None)] * 2]


@pytest.mark.parametrize(("asked", "used"), [(None, 30.0), (5.0, 5.0), (100.0, 30.0)])
async def test_the_shorter_of_two_timeouts_applies(
    max_wait: float, client: httpx.AsyncClient, engine: FakeEngine, asked: float | None, used: float
) -> None:
    assert (await client.post("/v1/completions", json={"prompt": "a", "timeout": asked})).status_code == 200
    assert engine.requests[-1].timeout == used


async def test_each_plain_key_is_a_separate_tenant(
    keys: list[str], client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for key in ("first", "second"):
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)).status_code == 200
    assert [request.salt for request in engine.requests] == keys


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", value) for value in (-101, 101, 1.5, True, "1")]
    + [("timeout", value) for value in (0, -1, 86401, "5", True)],
)
async def test_out_of_range_is_400(client: httpx.AsyncClient, field: str, value: float | bool | str) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("stream", [False, True])
async def test_a_timeout_is_503_with_retry_after(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    engine.failure = WaitTimeoutError("the request waited 5.0 seconds")
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded_waiting"
    assert int(response.headers["retry-after"]) > 0
    text = (await client.get("/metrics")).text
    assert 'prelude_requests_total{outcome="error",prompt="-",version="-"} 1.0' in text
    assert 'prelude_request_errors_total{code="overloaded_waiting"} 1.0' in text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/classify", {"input": ["a", "b"], "labels": ["x", "y"]}),
    ],
)
async def test_a_wait_timeout_returns_the_time_to_retry(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    engine.failure = WaitTimeoutError("the request waited 5.0 seconds")
    admission = app.state.services.admission
    with admission.permits(4):
        admission._begun.extend([time.monotonic() - 20.0] * 8)
        response = await client.post(path, json=body)
    assert response.status_code == 503
    milliseconds = int(response.headers["retry-after-ms"])
    # One sequence begins every 2.5 seconds. The estimate may count the request with the four, plus one turn.
    assert 10_000 <= milliseconds <= 25_000
    assert int(response.headers["retry-after"]) == math.ceil(milliseconds / 1000)


async def test_the_duration_of_each_phase_is_observed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.queue_seconds = 0.5
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    lines = set((await client.get("/metrics")).text.splitlines())
    assert {
        "prelude_request_queue_time_seconds_sum 0.5",
        "prelude_request_prefill_time_seconds_count 1.0",
        "prelude_request_decode_time_seconds_count 1.0",
    } <= lines


@pytest.mark.parametrize(
    ("tier", "is_batch"), [("batch", True), ("flex", True), ("auto", False), ("default", False), (None, False)]
)
async def test_the_service_tier_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, tier: str | None, is_batch: bool
) -> None:
    fields = {"service_tier": tier}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert (await client.post("/v1/chat/completions", json=chat | fields)).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "a"} | fields)).status_code == 200
    classified = {"input": "a", "labels": ["b"]} | fields
    assert (await client.post("/v1/classify", json=classified)).status_code == 200
    assert [request.is_batch for request in engine.requests] == [is_batch] * 3


async def test_only_its_own_timeout_applies_to_the_batch_tier(
    max_wait: float, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": "a", "service_tier": "batch"}
    await client.post("/v1/completions", json=body)
    await client.post("/v1/completions", json=body | {"timeout": 100})
    assert [request.timeout for request in engine.requests] == [None, 100.0]


async def test_the_batch_tier_takes_no_places_of_the_others(client: httpx.AsyncClient, app: FastAPI) -> None:
    services = app.state.services
    with services.batch_admission.permits(services.batch_admission.capacity):
        refused = await client.post("/v1/completions", json={"prompt": "a", "service_tier": "batch"})
        assert refused.status_code == 429
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    with services.admission.permits(services.admission.capacity):
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 429
        served = await client.post("/v1/completions", json={"prompt": "a", "service_tier": "batch"})
        assert served.status_code == 200


async def test_the_batch_tier_has_histograms_of_its_own(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.queue_seconds = 0.001
    await client.post("/v1/completions", json={"prompt": "a", "service_tier": "batch"})
    text = (await client.get("/metrics")).text
    names = ["time_to_first_token", "inter_token_latency", "e2e_request_latency"]
    for name in [*names, "request_queue_time", "request_prefill_time", "request_decode_time"]:
        assert f"prelude_{name}_seconds_count 0.0" in text
        assert f"prelude_batch_tier_{name}_seconds_count 0.0" not in text
