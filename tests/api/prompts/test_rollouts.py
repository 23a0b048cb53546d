"""Rollouts over HTTP: which version answers, sticky keys, errors, deletion, pins and import."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from math import sqrt
from typing import Any

import httpx
import pytest

from prompt_store import rollouts
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

CANARY = {"version": 1, "canaries": {"2": 25}}


@pytest.fixture
async def rolling(client: httpx.AsyncClient, upload_parts: UploadParts) -> httpx.AsyncClient:
    """``p`` has three versions; ``latest`` is 1, and 2 gets a quarter of the requests."""
    for seed in range(3):
        (await client.post("/v1/prompts", **upload_parts("p", seed=seed))).raise_for_status()
    response = await client.put("/v1/prompts/p/aliases/latest", json=CANARY)
    assert response.json() == {
        "object": "prompt.alias",
        "id": "p",
        "alias": "latest",
        "version": 1,
        "rollout": {"canaries": {"2": 25.0}, "shadow": None},
    }
    return client


async def answered_by(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> str:
    body = {"model": "p", "prompt": "x", "max_tokens": 1, **fields}
    response = await client.post("/v1/completions", json=body, headers=headers)
    response.raise_for_status()
    return response.headers["x-prelude-prompt"]


async def test_requests_are_shared_and_the_header_names_the_version(
    rolling: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "random", random.Random(3))
    digests = {
        f"p@{version['version']}": version["digest"]
        for version in (await rolling.get("/v1/prompts/p/versions")).json()["data"]
    }
    served = []
    for _ in range(400):
        # Two texts of one request: both are answered by the version that the header names.
        served.append(await answered_by(rolling, prompt=["x", "y"]))
        used = {request.soft_prompt.digest for request in engine.requests[-2:] if request.soft_prompt}
        assert used == {digests[served[-1]]}
    counts = Counter(served)
    assert counts.keys() == {"p@1", "p@2"}
    assert abs(counts["p@2"] - 100) < 3 * sqrt(400 * 0.25 * 0.75)
    assert await answered_by(rolling, model="p@3") == "p@3"
    assert {await answered_by(rolling, model="p@1") for _ in range(20)} == {"p@1"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/classify"])
async def test_a_user_and_a_key_are_sticky(rolling: httpx.AsyncClient, path: str) -> None:
    text: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
    if "chat" in path:
        text = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    elif "classify" in path:
        text = {"input": "x", "labels": ["a", "b"]}

    async def version(headers: dict[str, str] | None = None, **fields: Any) -> str:
        response = await rolling.post(path, json={"model": "p", **text, **fields}, headers=headers)
        response.raise_for_status()
        return response.headers["x-prelude-prompt"]

    by_user = {user: await version(user=user) for user in map(str, range(24))}
    assert set(by_user.values()) == {"p@1", "p@2"}
    assert by_user == {user: await version(user=user) for user in by_user}
    by_key = {user: await version({"X-Prelude-Sticky-Key": user}, user="someone") for user in by_user}
    assert by_key == by_user  # the header comes first


async def test_a_promotion_in_the_middle_loses_no_request(rolling: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.step_seconds = 0.001
    running = [asyncio.create_task(answered_by(rolling)) for _ in range(4)]
    await until(lambda: bool(engine.requests))
    response = await rolling.put("/v1/prompts/p/aliases/latest", json={"version": 3, "expected_version": 1})
    assert response.json()["rollout"] is None
    assert set(await asyncio.gather(*running)) <= {"p@1", "p@2", "p@3"}
    assert {await answered_by(rolling) for _ in range(20)} == {"p@3"}


async def test_lists_and_the_history_show_the_rollout(rolling: httpx.AsyncClient) -> None:
    (listed,) = (await rolling.get("/v1/prompts")).json()["data"]
    assert listed["aliases"] == {"latest": 1}
    assert listed["rollouts"] == {"latest": {"canaries": {"2": 25.0}, "shadow": None}}
    newest = (await rolling.get("/v1/prompts/p/history")).json()["data"][0]
    assert (newest["action"], newest["alias"], newest["version"]) == ("rollout", "latest", 1)
    assert newest["details"] == {"from": {}, "to": {"canaries": {"2": 25.0}}}
    rollback = (await rolling.post("/v1/prompts/p/aliases/latest/rollback", json={})).json()
    assert (rollback["version"], rollback["rollout"]) == (1, None)
    assert (await rolling.get("/v1/prompts/p")).json()["rollouts"] == {}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"version": 1, "canaries": {"9": 5}}, 404, "has no version 9"),
        ({"version": 1, "canaries": {"1": 5}}, 400, "canaries: version 1 is the alias's own"),
        ({"version": 1, "canaries": {"2": 60, "3": 60}}, 400, "take 120% of the requests"),
        ({"version": 1, "canaries": {"x": 5}}, 400, "'x' is not a version number"),
        ({"version": 1, "canaries": {"2": 0}}, 400, "canaries"),
        ({"version": 1, "shadow": {"version": 1, "percent": 5}}, 400, "shadow: version 1 is the alias's own"),
        ({"version": 1, "shadow": {"version": 2}}, 400, "percent"),
        ({"version": 2, "canaries": {"3": 5}, "expected_version": 3}, 409, "points at 1, not at 3"),
    ],
)
async def test_an_invalid_rollout_changes_nothing(
    rolling: httpx.AsyncClient, body: dict[str, Any], status: int, message: str
) -> None:
    response = await rolling.put("/v1/prompts/p/aliases/latest", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    prompt = (await rolling.get("/v1/prompts/p")).json()
    assert prompt["rollouts"]["latest"]["canaries"] == {"2": 25.0}


async def test_a_canary_is_deleted_only_by_force(rolling: httpx.AsyncClient) -> None:
    refused = await rolling.delete("/v1/prompts/p/versions/2")
    assert refused.status_code == 409
    assert "in the rollout of the alias latest" in refused.json()["error"]["message"]
    deleted = (await rolling.delete("/v1/prompts/p/versions/2", params={"force": "true"})).json()
    assert (deleted["aliases"], deleted["ended_rollouts"]) == ({}, ["latest"])
    assert {await answered_by(rolling) for _ in range(20)} == {"p@1"}


async def test_pins_of_an_alias_include_its_canaries(rolling: httpx.AsyncClient, engine: FakeEngine) -> None:
    async def are_pinned(*versions: int) -> bool:
        prompt = (await rolling.get("/v1/prompts/p")).json()
        return prompt["pinned"] == list(versions) and len(engine.pinned) == len(versions)

    (await rolling.post("/v1/prompts/p/warm", json={"pin": True})).raise_for_status()
    await until(lambda: are_pinned(1, 2))
    (await rolling.put("/v1/prompts/p/aliases/latest", json={"version": 1, "canaries": {"3": 5}})).raise_for_status()
    await until(lambda: are_pinned(1, 3))
    (await rolling.put("/v1/prompts/p/aliases/latest", json={"version": 2})).raise_for_status()
    await until(lambda: are_pinned(2))
    (await rolling.put("/v1/prompts/p/aliases/latest", json={"version": 2, "canaries": {"3": 5}})).raise_for_status()
    await until(lambda: are_pinned(2, 3))
    (await rolling.post("/v1/prompts/p/warm", json={"pin": False})).raise_for_status()
    await until(are_pinned)


async def test_an_import_starts_the_rollout_of_a_new_alias(rolling: httpx.AsyncClient) -> None:
    rollout = {"canaries": {"2": 5.0}, "shadow": {"version": 3, "percent": 10.0}}
    body = {"aliases": {"stable": 1, "bad": 1}, "rollouts": {"stable": rollout, "bad": {"canaries": {"9": 5}}}}
    reply = (await rolling.post("/v1/prompts/p/import", json=body)).json()
    assert (reply["aliases"], reply["missing_rollouts"]) == ({"bad": 1, "stable": 1}, ["bad"])
    prompt = (await rolling.get("/v1/prompts/p")).json()
    assert prompt["rollouts"]["stable"] == rollout
    assert "bad" not in prompt["rollouts"]
    own = await rolling.post(
        "/v1/prompts/p/import", json={"aliases": {"x": 2}, "rollouts": {"x": {"canaries": {"2": 5}}}}
    )
    assert own.status_code == 400
    assert "version 2 is the alias's own" in own.json()["error"]["message"]


async def test_failed_requests_are_counted_by_version(rolling: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure = RuntimeError("broken")
    body = {"model": "p@2", "prompt": "x", "max_tokens": 1}
    assert (await rolling.post("/v1/completions", json=body)).status_code == 500
    engine.failure = None
    await answered_by(rolling, model="p@2")
    usage = {one["version"]: one for one in (await rolling.get("/v1/prompts/p/usage")).json()["data"]}
    assert (usage[2]["requests"], usage[2]["errors"]) == (2, 1)
    assert (usage[1]["requests"], usage[1]["errors"]) == (0, 0)


async def test_of_two_clients_the_second_overwrites_no_rollout_that_it_has_not_seen(
    rolling: httpx.AsyncClient,
) -> None:
    seen = (await rolling.get("/v1/prompts/p")).json()["rollouts"]["latest"]
    path, change = "/v1/prompts/p/aliases/latest", {"version": 1, "expected_version": 1, "expected_rollout": seen}
    assert (await rolling.put(path, json=change | {"canaries": {"2": 50}})).status_code == 200
    for body in (change | {"canaries": {"3": 5}}, change, change | {"version": 2}):
        response = await rolling.put(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
    back = await rolling.post(f"{path}/rollback", json={"expected_rollout": seen})
    assert (back.status_code, back.json()["error"]["code"]) == (409, "conflict")
    now = (await rolling.get("/v1/prompts/p")).json()["rollouts"]
    assert now == {"latest": {"canaries": {"2": 50.0}, "shadow": None}}
    assert (await rolling.post(f"{path}/rollback", json={"expected_rollout": now["latest"]})).status_code == 200
    started = {"version": 1, "canaries": {"2": 5}, "expected_rollout": {}}
    assert (await rolling.put(path, json=started)).status_code == 200
    assert (await rolling.put(path, json=started)).status_code == 409
    invalid = await rolling.put(path, json=change | {"expected_rollout": {"canaries": {"2": 101}}})
    assert invalid.status_code == 400
