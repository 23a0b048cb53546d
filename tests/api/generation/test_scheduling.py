"""Tenants, priorities and timeouts on their way from a request to the engine, and what a timeout looks like."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace

import pytest

from server.errors import WaitTimeoutError

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(make_app, settings, request, tmp_path):
    """With two keys or a limit of waiting, where a test asks for them."""
    http = settings.http
    if "keys" in request.fixturenames:
        path = tmp_path / "keys"
        path.write_text("first\nsecond\n")
        http = replace(http, api_key_file=path)
    if "max_wait" in request.fixturenames:
        http = replace(http, max_wait_seconds=30.0)
    return make_app(replace(settings, http=http))


@pytest.fixture
def keys():
    return [f"key-{hashlib.sha256(key).hexdigest()[:12]}" for key in (b"first", b"second")]


@pytest.fixture
def max_wait():
    return 30.0


async def test_defaults(client, engine):
    for fields in ({}, {"priority": None, "timeout": None}):
        assert (await client.post("/v1/completions", json={"prompt": "a"} | fields)).status_code == 200
        request = engine.requests[-1]
        assert (request.salt, request.priority, request.timeout) == ("", 0, None)


async def test_priority_and_timeout_reach_the_engine(client, engine):
    chat = {"messages": [{"role": "user", "content": "x"}], "priority": -100, "timeout": 5}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": ["a", "b"], "priority": 100})).status_code == 200
    assert [(request.priority, request.timeout) for request in engine.requests] == [(-100, 5.0), *[(100, None)] * 2]


@pytest.mark.parametrize(("asked", "used"), [(None, 30.0), (5.0, 5.0), (100.0, 30.0)])
async def test_the_shorter_of_both_timeouts_counts(max_wait, client, engine, asked, used):
    assert (await client.post("/v1/completions", json={"prompt": "a", "timeout": asked})).status_code == 200
    assert engine.requests[-1].timeout == used


async def test_a_key_is_a_tenant(keys, client, engine):
    for key in ("first", "second"):
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)).status_code == 200
    assert [request.salt for request in engine.requests] == keys


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", value) for value in (-101, 101, 1.5, True, "1")]
    + [("timeout", value) for value in (0, -1, 86401, "5", True)],
)
async def test_out_of_range_is_400(client, field, value):
    response = await client.post("/v1/completions", json={"prompt": "a", field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("stream", [False, True])
async def test_a_timeout_is_503_with_retry_after(client, engine, stream):
    engine.failure = WaitTimeoutError("the request waited 5.0 seconds")
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded_waiting"
    assert int(response.headers["retry-after"]) > 0
    text = (await client.get("/metrics")).text
    assert 'prelude_requests_total{outcome="error",prompt="-"} 1.0' in text
    assert 'prelude_request_errors_total{code="overloaded_waiting"} 1.0' in text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/classify", {"input": ["a", "b"], "labels": ["x", "y"]}),
    ],
)
async def test_who_has_waited_in_vain_is_told_when_the_queue_has_moved(app, client, engine, path, body):
    engine.failure = WaitTimeoutError("the request waited 5.0 seconds")
    admission = app.state.services.admission
    with admission.permits(4):
        admission._begun.extend([time.monotonic() - 20.0] * 8)
        response = await client.post(path, json=body)
    assert response.status_code == 503
    milliseconds = int(response.headers["retry-after-ms"])
    # A sequence begins every 2.5 seconds; the request's own may be counted with the four, and it gets one turn.
    assert 10_000 <= milliseconds <= 25_000
    assert int(response.headers["retry-after"]) == math.ceil(milliseconds / 1000)


async def test_phases_are_observed(client, engine):
    engine.queue_seconds = 0.5
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    lines = set((await client.get("/metrics")).text.splitlines())
    assert {
        "prelude_request_queue_time_seconds_sum 0.5",
        "prelude_request_prefill_time_seconds_count 1.0",
        "prelude_request_decode_time_seconds_count 1.0",
    } <= lines
