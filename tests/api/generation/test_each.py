"""``"ensemble": "each"`` and ``return_timings``: several members answer one text in one request, and tell when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.engine.types import Capability, GenerateRequest, TokenEvent
from server.errors import NotFiniteError
from tests.support.api_fixtures import CountingStore, UploadParts
from tests.support.fake_engine import CONTEXT, FakeEngine
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

REPLIES = {0: "base", 4: "four", 5: "five!"}
"""What the engine answers by the number of virtual tokens."""

Fail = Callable[[int, int], None]


@pytest.fixture
async def members(client: httpx.AsyncClient, app: FastAPI, upload_parts: UploadParts) -> list[str]:
    """Two soft prompts of 4 and 5 virtual tokens, and the base."""
    app.state.services.admission.capacity = 32
    for rows, name in ((4, "a"), (5, "b")):
        (await client.post("/v1/prompts", **upload_parts(name, seed=rows, rows=rows))).raise_for_status()
    return ["a", "b@1", "tiny"]


@pytest.fixture
def fail(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let a member, by its virtual tokens, fail after this many tokens; every member has its reply."""
    failing: dict[int, int] = {}
    generate = engine.generate

    async def answer(request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        rows = request.soft_prompt.num_virtual_tokens if request.soft_prompt else 0
        engine.reply = REPLIES[rows]
        num_sent = 0
        async for event in generate(request):
            if num_sent == failing.get(rows):
                raise NotFiniteError("the model computed a value that is not finite")
            num_sent += 1
            yield event
            await asyncio.sleep(0)

    monkeypatch.setattr(engine, "generate", answer)
    return failing.__setitem__


async def chunks_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    *events, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_each_member_has_its_choices(
    client: httpx.AsyncClient, members: list[str], fail: Fail, store: CountingStore
) -> None:
    body = {"model": members, "ensemble": "each", "prompt": ["x", "yz"], "n": 2, "max_tokens": 9}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert [choice["index"] for choice in found["choices"]] == list(range(12))
    assert [choice["model"] for choice in found["choices"]] == ["a@1"] * 4 + ["b@1"] * 4 + ["tiny"] * 4
    assert [choice["text"] for choice in found["choices"]] == ["four"] * 4 + ["five!"] * 4 + ["base"] * 4
    assert response.headers["x-prelude-prompt"] == "a@1,b@1"
    assert found["usage"]["prompt_tokens"] == 3 * (2 + 3)
    assert found["usage"]["completion_tokens"] == 4 * (5 + 6 + 5)
    assert found["usage"]["prompt_tokens_details"]["virtual_tokens"] == 2 * (4 + 5)
    await until(lambda: len(store.released) == len(store.leased))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_choices_are_streamed_as_they_come(
    client: httpx.AsyncClient, members: list[str], fail: Fail, engine: FakeEngine, path: str
) -> None:
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    chunks = await chunks_of(client, path, asked | {"model": members, "ensemble": "each", "return_timings": True})
    texts = {0: "", 1: "", 2: ""}
    order = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["model"] == ["a@1", "b@1", "tiny"][choice["index"]]
        assert chunk["model"] == "a,b@1,tiny"
        assert chunk["step"] >= 1
        texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        order.append(choice["index"])
    assert list(texts.values()) == ["four", "five!", "base"]
    assert order != sorted(order), "the choices are not interleaved"
    last = {chunk["choices"][0]["index"]: chunk["choices"][0] for chunk in chunks}
    for index, num_tokens in ((0, 5), (1, 6), (2, 5)):
        assert last[index]["finish_reason"] == "stop"
        timings = last[index]["timings"]
        assert (timings["first_step"], timings["last_step"]) == (1, num_tokens)
        assert timings["first_token_seconds"] >= 0
        assert timings["decode_seconds"] >= 0
    assert engine.in_flight == 0


async def test_a_late_failure_ends_its_own_choice(
    client: httpx.AsyncClient, members: list[str], fail: Fail, engine: FakeEngine, store: CountingStore
) -> None:
    fail(4, 2)
    for path, asked in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        chunks = await chunks_of(client, path, asked | {"model": members, "ensemble": "each"})
        last = {chunk["choices"][0]["index"]: chunk["choices"][0] for chunk in chunks}
        assert [last[index]["finish_reason"] for index in range(3)] == ["error", "stop", "stop"]
        assert last[0]["error"]["code"] == "request_failed"
        assert "not finite" in last[0]["error"]["message"]
        assert "error" not in last[1]
    metrics = (await client.get("/metrics")).text
    assert 'prelude_request_errors_total{code="request_failed"} 2.0' in metrics
    await until(lambda: (engine.in_flight, len(store.released)) == (0, len(store.leased)))


async def test_an_early_failure_ends_the_request(
    client: httpx.AsyncClient, members: list[str], fail: Fail, engine: FakeEngine
) -> None:
    fail(4, 0)
    body = {"model": members, "ensemble": "each", "prompt": "x"}
    for stream in (True, False):
        response = await client.post("/v1/completions", json=body | {"stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "request_failed")
    fail(4, 2)
    assert (await client.post("/v1/completions", json=body)).status_code == 500
    assert engine.in_flight == 0


async def test_every_unfit_member_is_reported(
    client: httpx.AsyncClient, members: list[str], other_parts: UploadParts, engine: FakeEngine, store: CountingStore
) -> None:
    (await client.post("/v1/prompts", **other_parts("tasks"))).raise_for_status()
    names = ["ghost", "a", "b@9", "No Name", "tasks", "a@latest"]
    response = await client.post("/v1/completions", json={"model": names, "ensemble": "each", "prompt": "x"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith("5 of 6 members cannot answer: ")
    assert [(fault["field"], fault["member"], fault["code"]) for fault in error["details"]] == [
        ("model[0]", "ghost", "model_not_found"),
        ("model[2]", "b@9", "prompt_not_found"),
        ("model[3]", "No Name", "model_not_found"),
        ("model[4]", "tasks", "invalid_request"),
        ("model[5]", "a@latest", "invalid_request"),
    ]
    await until(lambda: len(store.released) == len(store.leased))
    assert engine.requests == []
    unknown = {"prompt_ids": ["a", "ghost"], "ensemble": "each", "prompt": "x"}
    response = await client.post("/v1/completions", json=unknown)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "prompt_not_found")
    assert response.json()["error"]["details"][0]["field"] == "prompt_ids[1]"
    long = {"model": members, "ensemble": "each", "prompt": "x", "max_tokens": CONTEXT - 6}
    response = await client.post("/v1/completions", json=long)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert [fault["member"] for fault in response.json()["error"]["details"]] == ["b@1"]


async def test_what_the_engine_lacks_is_a_fault_of_the_member(
    client: httpx.AsyncClient, members: list[str], other_parts: UploadParts, engine: FakeEngine
) -> None:
    (await client.post("/v1/prompts", **other_parts("keys", peft_type="PREFIX_TUNING"))).raise_for_status()
    engine.capabilities = tuple(one for one in Capability if one is not Capability.KEY_VALUES)
    response = await client.post("/v1/completions", json={"model": ["a", "keys"], "ensemble": "each", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_by_engine")
    assert [fault["member"] for fault in response.json()["error"]["details"]] == ["keys"]


async def test_each_member_may_have_its_task(
    client: httpx.AsyncClient, members: list[str], other_parts: UploadParts, engine: FakeEngine
) -> None:
    (await client.post("/v1/prompts", **other_parts("tasks"))).raise_for_status()
    body = {"model": ["tasks", "tasks", "a"], "ensemble": "each", "prompt": "x", "max_tokens": 1}
    response = await client.post("/v1/completions", json=body | {"task_id": [2, 0, None]})
    assert response.status_code == 200, response.text
    sources = [request.soft_prompt for request in engine.requests]
    assert [source and source.task_id for source in sources] == [2, 0, None]
    for tasks, message in (
        ([0, 0, None], "named twice"),
        ([0, 1], "2 tasks for 3 members"),
        ([0, 3, None], "task 3"),
    ):
        response = await client.post("/v1/completions", json=body | {"task_id": tasks})
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": ["a", "b"], "task_id": [0, 1], "prompt": "x"}, "task_id"),
        ("/v1/completions", {"model": "a", "ensemble": "each", "prompt": "x"}, "ensemble"),
        ("/v1/completions", {"model": ["a", "a"], "ensemble": "each", "prompt": "x"}, "model"),
        ("/v1/completions", {"model": "a", "task_id": -1, "prompt": "x"}, "task_id"),
        ("/v1/completions", {"model": "a", "task_id": [True], "prompt": "x"}, "task_id"),
        ("/v1/completions", {"model": "a", "task_id": [0] * 17, "prompt": "x"}, "task_id"),
        ("/v1/chat/completions", {"model": ["a", "b"], "messages": [{"role": "user", "content": "x"}]}, "ensemble"),
        ("/v1/classify", {"model": ["a", "b"], "ensemble": "each", "input": "x", "labels": ["y"]}, "ensemble"),
    ],
)
async def test_fields_that_do_not_go_together_are_refused(
    client: httpx.AsyncClient, members: list[str], path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_all_members_have_a_place_or_none(
    client: httpx.AsyncClient, members: list[str], app: FastAPI, engine: FakeEngine
) -> None:
    app.state.services.admission.capacity = 2
    body = {"model": members, "ensemble": "each", "prompt": "x"}
    assert (await client.post("/v1/completions", json=body)).status_code == 400
    assert engine.requests == []


async def test_timings_are_returned_only_on_request(
    client: httpx.AsyncClient, members: list[str], engine: FakeEngine
) -> None:
    engine.queue_seconds = 0.25
    for path, asked in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        plain = (await client.post(path, json=asked)).json()
        assert "timings" not in plain["choices"][0]
        timings = (await client.post(path, json=asked | {"return_timings": True})).json()["choices"][0]["timings"]
        assert (timings["queue_seconds"], timings["prefill_seconds"], timings["first_step"]) == (0.25, 0.25, 1)
        assert all("step" not in chunk for chunk in await chunks_of(client, path, asked))
