"""Shadow requests: what is copied, compared, dropped, and never returned or counted against a key."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api import shadowing
from server.api.services import Services
from server.api.shadowing import Compared, copied_body
from server.engine.types import MAX_PRIORITY, GenerateRequest
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["x", "y"], "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "n": 2},
    "/v1/classify": {"input": ["x", "y"], "labels": ["a", "b"]},
}


@pytest.fixture
async def shadowed(client: httpx.AsyncClient, upload_parts: UploadParts) -> httpx.AsyncClient:
    """All requests to ``p``, which is version 1, are copied to version 2."""
    for seed in range(2):
        (await client.post("/v1/prompts", **upload_parts("p", seed=seed))).raise_for_status()
    body = {"version": 1, "shadow": {"version": 2, "percent": 100}}
    (await client.put("/v1/prompts/p/aliases/latest", json=body)).raise_for_status()
    return client


def compared(app: FastAPI) -> Compared:
    services: Services = app.state.services
    return services.shadowing.result("p@2")


@pytest.mark.parametrize("path", BODIES)
async def test_a_copy_is_compared_and_not_returned(
    shadowed: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, path: str
) -> None:
    plain = (await shadowed.post(path, json={"model": "p@1", **BODIES[path]})).json()
    assert compared(app) == Compared()
    before = len(engine.requests)
    response = await shadowed.post(path, json={"model": "p", "user": "someone", "timeout": 30, **BODIES[path]})
    assert response.headers["x-prelude-prompt"] == "p@1"
    for key in ("choices", "data"):
        assert response.json().get(key) == plain.get(key)
    await until(lambda: compared(app) == Compared(equal=1))
    ours = [request for request in engine.requests[before:] if not request.is_batch]
    copies = [request for request in engine.requests[before:] if request.is_batch]
    assert len(ours) == len(copies) > 0
    assert {request.priority for request in copies} == {MAX_PRIORITY}

    def asked(requests: list[GenerateRequest]) -> list[tuple[list[int], int]]:
        return sorted((list(request.prompt_token_ids), request.params.max_tokens) for request in requests)

    assert asked(ours) == asked(copies)
    digests = [{request.soft_prompt.digest for request in part if request.soft_prompt} for part in (ours, copies)]
    assert len(digests[0]) == len(digests[1]) == 1
    assert digests[0] != digests[1]


async def test_a_stream_is_copied_too(shadowed: httpx.AsyncClient, app: FastAPI, engine: FakeEngine) -> None:
    body = {"model": "p", "prompt": "x", "max_tokens": 3, "stream": True}
    response = await shadowed.post("/v1/completions", json=body)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert all(event["choices"][0]["logprobs"] is None for event in events)  # they are only for the comparison
    await until(lambda: compared(app) == Compared(equal=1))


async def test_a_different_answer_is_counted_with_its_difference(
    shadowed: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    generate = engine.generate

    async def by_version(request: GenerateRequest) -> Any:
        engine.reply = "b" if request.is_batch else "a"
        async for event in generate(request):
            yield event

    engine.generate = by_version  # type: ignore[method-assign]
    body = {"model": "p", "prompt": "x", "max_tokens": 1}
    with caplog.at_level("INFO", logger="server.api.shadowing"):
        response = await shadowed.post("/v1/completions", json=body, headers={"x-request-id": "abc"})
        assert response.json()["choices"][0]["text"] == "a"
        await until(lambda: compared(app).different == 1)
    assert compared(app) == Compared(different=1, logprob_difference=-1 / 512)  # "b" is one byte above "a"
    assert "request abc.shadow: the answer of the shadow p@2 is different from that of p@1" in caplog.text
    metrics = (await shadowed.get("/metrics")).text
    assert 'prelude_shadow_requests_total{prompt="p",result="different",version="2"} 1.0' in metrics
    assert 'prelude_shadow_logprob_difference_nats_count{prompt="p",version="2"} 1.0' in metrics


async def test_nothing_is_copied_while_the_server_is_busy(
    shadowed: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "p", "prompt": "x", "max_tokens": 1}
    engine.stats.num_waiting = 1
    (await shadowed.post("/v1/completions", json=body)).raise_for_status()
    assert compared(app) == Compared(dropped=1)
    engine.stats.num_waiting = 0
    monkeypatch.setattr(shadowing, "MAX_IN_FLIGHT", 0)
    (await shadowed.post("/v1/completions", json=body)).raise_for_status()
    assert compared(app) == Compared(dropped=2)
    assert not any(request.is_batch for request in engine.requests)


async def test_a_failing_shadow_fails_no_request(
    shadowed: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    generate = engine.generate

    async def failing(request: GenerateRequest) -> Any:
        engine.failure = RuntimeError("broken") if request.is_batch else None
        async for event in generate(request):
            yield event

    engine.generate = failing  # type: ignore[method-assign]
    response = await shadowed.post("/v1/completions", json={"model": "p", "prompt": "x", "max_tokens": 1})
    assert response.status_code == 200
    await until(lambda: compared(app) == Compared(errors=1))


async def test_ensembles_and_numbered_versions_are_not_copied(
    shadowed: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    for model in (["p", "tiny"], "p@1", "p@2", "tiny"):
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        (await shadowed.post("/v1/completions", json=body)).raise_for_status()
    assert compared(app) == Compared()


def test_a_copy_has_what_a_comparison_needs() -> None:
    body = {"model": "p", "adapter_id": "a", "prompt": "x", "stream": True, "stream_options": {}, "logprobs": 3}
    copied = copied_body("/v1/completions", body, "p@2+a@1")
    assert copied == {
        "model": "p@2+a@1",
        "prompt": "x",
        "stream": False,
        "logprobs": 3,
        "return_token_ids": True,
        "service_tier": "batch",
        "priority": MAX_PRIORITY,
    }
    assert copied_body("/v1/chat/completions", {"logprobs": False}, "p@2")["logprobs"] is True
    assert "logprobs" not in copied_body("/v1/classify", {"input": "x"}, "p@2")
