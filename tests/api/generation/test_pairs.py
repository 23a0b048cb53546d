"""Requests that name an adapter, or a soft prompt and an adapter, on every route that runs the model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.engine.types import GenerateRequest
from server.logs import FIELDS
from tests.api.classification.test_classify import classifier_parts
from tests.support.api_fixtures import CountingStore, UploadParts, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.presence import present

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pair")]

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 3}),
    "stream": ("/v1/completions", {"prompt": "a", "stream": True}),
    "echo": ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 2}),
    "structure": ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["x", "y"]}}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}),
    "tools": (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "required",
        },
    ),
    "labels": ("/v1/classify", {"input": ["a", "b"], "labels": ["x", "y"]}),
}
PAIRS: list[dict[str, Any]] = [
    {"model": "tone+triage"},
    {"model": "triage@latest+tone@1"},
    {"model": "tiny:tone@1+triage@1"},
    {"model": "tone", "adapter_id": "triage"},
    {"prompt_id": "tone", "adapter_id": "triage@1"},
    {"model": "tiny", "prompt_id": "triage+tone"},
]
ALONE: list[dict[str, Any]] = [
    {"model": "triage"},
    {"model": "tiny:triage@1"},
    {"prompt_id": "triage@latest"},
    {"model": "tiny", "adapter_id": "triage"},
    {"adapter_id": "triage@1"},
]


async def digest_of(client: httpx.AsyncClient, name: str) -> str:
    digest: str = (await client.get(f"/v1/prompts/{name}")).json()["latest"]["digest"]
    return digest


def digests_of(request: GenerateRequest) -> tuple[str | None, str | None]:
    return tuple(None if one is None else one.digest for one in (request.soft_prompt, request.adapter))  # type: ignore[return-value]


@pytest.mark.parametrize("route", ROUTES)
async def test_every_route_sends_both_of_a_pair_to_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, store: CountingStore, eventually: WaitUntil, route: str
) -> None:
    url, fields = ROUTES[route]
    if route == "tools":
        engine.reply = '[{"name": "f", "parameters": {}}]'
    tone, triage = await digest_of(client, "tone"), await digest_of(client, "triage")
    response = await client.post(url, json={**fields, "model": "triage+tone@1"})
    assert response.status_code == 200, response.text
    assert response.headers["x-prelude-prompt"] == "tone@1+triage@1"
    assert {digests_of(request) for request in engine.requests} == {(tone, triage)}
    eventually(lambda: len(store.leased) == len(store.released) == 2)


@pytest.mark.parametrize("names", PAIRS)
async def test_a_pair_can_be_named_in_several_ways(
    client: httpx.AsyncClient, engine: FakeEngine, names: dict[str, Any]
) -> None:
    for url, fields in (ROUTES["chat"], ROUTES["labels"], ROUTES["completion"]):
        response = await client.post(url, json={**fields, **names})
        assert response.status_code == 200, response.text
        assert response.headers["x-prelude-prompt"] == "tone@1+triage@1"
        assert response.json()["model"] == names.get("model", "tiny")
        assert response.json()["usage"]["prompt_tokens_details"]["virtual_tokens"] % 4 == 0
    assert all(request.soft_prompt and request.adapter for request in engine.requests)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert (await client.post(path, json={**body, **names})).status_code == 200


@pytest.mark.parametrize("names", ALONE)
async def test_an_adapter_can_be_named_as_a_soft_prompt_is(
    client: httpx.AsyncClient, engine: FakeEngine, names: dict[str, Any]
) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", **names})
    assert response.status_code == 200, response.text
    assert response.headers["x-prelude-prompt"] == "triage@1"
    assert response.json()["usage"]["prompt_tokens_details"]["virtual_tokens"] == 0
    assert digests_of(engine.requests[0]) == (None, await digest_of(client, "triage"))


@pytest.mark.parametrize(
    ("names", "status", "param", "text"),
    [
        ({"model": "tone+other"}, 400, "model", "two soft prompts"),
        ({"model": "triage+style"}, 400, "model", "two adapters"),
        ({"prompt_id": "triage", "adapter_id": "style"}, 400, "prompt_id", "two adapters"),
        ({"adapter_id": "tone"}, 400, "adapter_id", "is not an adapter"),
        ({"model": "tone", "adapter_id": "other"}, 400, "adapter_id", "is not an adapter"),
        ({"model": "tone+triage+style"}, 400, "model", "are 3"),
        ({"model": "tone+triage", "adapter_id": "style"}, 400, "adapter_id", "are 3"),
        ({"model": "tone+tone"}, 400, "model", "named twice"),
        ({"model": "tone+missing"}, 404, "model", "'missing'"),
        ({"model": "tone", "adapter_id": "triage@7"}, 404, "adapter_id", "version 7"),
        ({"model": "missing+triage"}, 404, "model", "'missing'"),
    ],
)
async def test_what_is_no_pair_names_the_field(
    client: httpx.AsyncClient, engine: FakeEngine, names: dict[str, Any], status: int, param: str, text: str
) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [ROUTES["completion"], ROUTES["chat"], ROUTES["labels"]]
    for url, fields in [*bodies, ("/tokenize", {"prompt": "a"})]:
        response = await client.post(url, json={**fields, **names})
        error = response.json()["error"]
        assert (response.status_code, error["param"], text in error["message"]) == (status, param, True), error
    assert engine.requests == []


async def test_one_of_a_pair_that_is_gone_is_named(client: httpx.AsyncClient) -> None:
    (await client.delete("/v1/prompts/triage")).raise_for_status()
    response = await client.post("/v1/completions", json={"model": "tone+triage", "prompt": "a"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "prompt_not_found")
    assert "'triage'" in error["message"]


async def test_a_soft_prompt_brings_the_adapter_that_it_was_trained_over(
    client: httpx.AsyncClient, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    (await client.post("/v1/prompts", **upload_parts("custom", seed=7, over="triage@1"))).raise_for_status()
    triage = await digest_of(client, "triage")
    for names in ({"model": "custom"}, {"model": "custom", "adapter_id": "triage"}, {"prompt_id": "triage+custom"}):
        response = await client.post("/v1/completions", json={"prompt": "a", **names})
        assert response.headers["x-prelude-prompt"] == "custom@1+triage@1"
        assert digests_of(engine.requests[-1])[1] == triage
    for names, param in (
        ({"model": "custom+style"}, "model"),
        ({"model": "custom", "adapter_id": "style"}, "adapter_id"),
    ):
        response = await client.post("/v1/completions", json={"prompt": "a", **names})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "wrong_adapter", param)
        assert "trained over the adapter triage@1" in error["message"]


async def test_metrics_and_logs_name_both(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for model in ("triage+tone", "triage", "tone"):
        (await client.post("/v1/completions", json={"model": model, "prompt": "a"})).raise_for_status()
    lines = set((await client.get("/metrics")).text.splitlines())
    assert lines >= {
        f'prelude_requests_total{{outcome="stop",prompt="{label}",version="{version}"}} 1.0'
        for label, version in (("tone+triage", "1+1"), ("triage", "1"), ("tone", "1"))
    }
    logged = [getattr(record, FIELDS) for record in caplog.records if hasattr(record, FIELDS)]
    keys = ("prompt", "version", "adapter", "adapter_version")
    found = [tuple(fields.get(key) for key in keys) for fields in logged if fields.get("operation")]
    assert found == [("tone", 1, "triage", 1), (None, None, "triage", 1), ("tone", 1, None, None)]


async def test_members_of_an_ensemble_may_be_adapters_and_pairs(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    app.state.services.admission.capacity = 32
    tone, triage = await digest_of(client, "tone"), await digest_of(client, "triage")
    style = await digest_of(client, "style")
    wanted = [(None, None), (tone, None), (None, triage), (tone, triage), (tone, style)]
    members = ["tiny", "tone", "triage", "tone+triage", "style+tone"]
    names = "tone@1,triage@1,tone@1+triage@1,tone@1+style@1"
    mean = await client.post("/v1/completions", json={"model": members, "ensemble": "mean", "prompt": "a"})
    # The limit of sequences in a step is 4.
    assert (mean.status_code, mean.json()["error"]["param"]) == (400, "model")
    mean = await client.post("/v1/completions", json={"model": members[1:], "ensemble": "mean", "prompt": "a"})
    assert mean.status_code == 200, mean.text
    assert mean.headers["x-prelude-prompt"] == names
    (request,) = engine.requests
    found = [digests_of(request)]
    found += [
        tuple(None if one is None else one.digest for one in (member.soft_prompt, member.adapter))  # type: ignore[misc]
        for member in request.others
    ]
    assert found == wanted[1:]
    engine.requests.clear()
    vote = await client.post("/v1/completions", json={"prompt_ids": members[1:], "prompt": "a"})
    assert vote.status_code == 200, vote.text
    assert [digests_of(request) for request in engine.requests] == wanted[1:]
    assert [member["model"] for member in vote.json()["choices"][0]["members"]] == names.split(",")
    labels = {"labels": ["x", "y"], "input": "a"}
    found_labels = await client.post("/v1/classify", json={"model": members, **labels})
    assert [item["model"] for item in found_labels.json()["data"][0]["members"]] == ["tiny", *names.split(",")]


@pytest.mark.parametrize(
    ("names", "param", "text"),
    [
        ({"model": ["tone", "other"], "adapter_id": "triage"}, "adapter_id", "name pairs in model, as NAME+ADAPTER"),
        ({"prompt_ids": ["tone", "other"], "adapter_id": "triage"}, "adapter_id", "name pairs in prompt_ids"),
        ({"model": ["tone+triage", "triage@1+tone@1"]}, "model", "tone@1+triage@1 is named twice"),
        ({"prompt_ids": ["tone+other", "triage"]}, "prompt_ids", "two soft prompts"),
        ({"model": ["tone+triage+style", "tone"]}, "model", "are 3"),
    ],
)
async def test_ensembles_of_what_is_no_member_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, names: dict[str, Any], param: str, text: str
) -> None:
    for url, fields in (("/v1/completions", {"prompt": "a"}), ROUTES["labels"]):
        response = await client.post(url, json={**fields, **names})
        error = response.json()["error"]
        assert (response.status_code, error["param"], text in error["message"]) == (400, param, True), error
    assert engine.requests == []


async def test_the_head_of_an_adapter_classifies_alone_and_beside_a_soft_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, adapter_parts: UploadParts
) -> None:
    parts = adapter_parts("topics", num_labels=2, metadata=json.dumps({"labels": ["u", "v"]}))
    (await client.post("/v1/prompts", **parts)).raise_for_status()
    for model in ("topics", "tone+topics"):
        response = await client.post("/v1/classify", json={"model": model, "input": "a"})
        assert response.status_code == 200, response.text
        assert list(response.json()["data"][0]["logits"]) == ["u", "v"]
        assert present(engine.requests[-1].adapter).num_labels == 2
        refused = await client.post("/v1/classify", json={"model": model, "input": "a", "labels": ["x", "y"]})
        assert "the adapter topics@1 has a head with 2 labels" in refused.json()["error"]["message"]
        refused = await client.post("/v1/completions", json={"model": model, "prompt": "a"})
        assert "the adapter topics@1 was trained for SEQ_CLS" in refused.json()["error"]["message"]
    refused = await client.post("/v1/classify", json={"model": "tone+triage", "input": "a"})
    message = refused.json()["error"]["message"]
    assert "the soft prompt tone@1 with the adapter triage@1 has no classification head" in message


async def test_a_pair_of_two_heads_is_refused(client: httpx.AsyncClient, adapter_parts: UploadParts) -> None:
    for name, parts in (("topics", adapter_parts("topics", num_labels=2)), ("heads", classifier_parts("heads"))):
        (await client.post("/v1/prompts", **parts)).raise_for_status()
        assert (await client.post("/v1/classify", json={"model": name, "input": "a"})).status_code == 200
    response = await client.post("/v1/classify", json={"model": "heads+topics", "input": "a"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "model")
    assert "the soft prompt heads@1 and the adapter topics@1 both have a classification head" in error["message"]


async def test_a_task_is_the_soft_prompts(
    client: httpx.AsyncClient, engine: FakeEngine, other_parts: UploadParts
) -> None:
    (await client.post("/v1/prompts", **other_parts("many"))).raise_for_status()
    body = {"model": "many+triage", "prompt": "a", "task_id": 2}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert present(engine.requests[0].soft_prompt).task_id == 2
    error = (await client.post("/v1/completions", json={**body, "model": "triage"})).json()["error"]
    assert (error["param"], "the adapter triage@1 is not one" in error["message"]) == ("task_id", True)
