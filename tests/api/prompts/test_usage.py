"""The use of versions, pruning, further names of the base, and imports, over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prompt_store.errors import StoreUnavailableError
from prompt_store.registry import Registry
from server.api.services import Services
from server.config import Settings
from tests.support.api_fixtures import MakeApp, UploadParts
from tests.support.in_process import ready

pytestmark = pytest.mark.anyio


@pytest.fixture
async def two(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    """Two versions of p."""
    for seed in (0, 1):
        (await client.post("/v1/prompts", **upload_parts("p", seed=seed))).raise_for_status()


def services_of(app: FastAPI) -> Services:
    services = app.state.services
    assert isinstance(services, Services)
    return services


async def usage(client: httpx.AsyncClient) -> dict[int, tuple[int, int, int]]:
    data = (await client.get("/v1/prompts/p/usage")).json()["data"]
    return {one["version"]: (one["requests"], one["prompt_tokens"], one["completion_tokens"]) for one in data}


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["usage"]
    return found


async def test_requests_and_tokens_are_counted_by_version(
    client: httpx.AsyncClient, app: FastAPI, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await usage(client) == {2: (0, 0, 0), 1: (0, 0, 0)}
    one = await complete(client, model="p")
    await complete(client, model="tiny")
    both = await complete(client, model=["p@1", "p@2"])
    of_each = both["completion_tokens"] // 2  # in a vote, each member writes its own text
    expected = {
        2: (2, 2 * one["prompt_tokens"], one["completion_tokens"] + of_each),
        1: (1, one["prompt_tokens"], of_each),
    }
    assert await usage(client) == expected
    counter = services_of(app).usage

    def fail(*_: object) -> None:
        raise StoreUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "add_use", fail)
        await counter.flush()
    assert await usage(client) == expected  # nothing is lost while the catalog is away
    await counter.flush()
    assert counter.pending_versions("p") == []
    assert await usage(client) == expected
    last = (await client.get("/v1/prompts/p/usage?limit=1")).json()
    assert 0 <= time.time() - last["data"][0]["last_used_at"] < 60
    assert (last["has_more"], last["last_id"]) == (True, 2)
    assert (await client.get("/v1/prompts/none/usage")).status_code == 404


async def test_the_list_has_the_95th_percentile_of_the_seconds(
    client: httpx.AsyncClient, app: FastAPI, two: None
) -> None:
    async def p95() -> float | None:
        (one,) = (await client.get("/v1/prompts?include=usage")).json()["data"]
        found: float | None = one["usage"]["p95_seconds"]
        return found

    assert await p95() is None
    await complete(client, model="p")
    measured = await p95()
    assert measured is not None
    assert 0 < measured < 60
    services = services_of(app)
    version = (await services.store.get_prompt("p")).latest
    for hundredths in range(1, 129):  # the newest 128: the measured one is not among them
        services.usage.count(version, prompt_tokens=1, completion_tokens=1, seconds=hundredths / 100)
    services.usage.count(version, prompt_tokens=1, completion_tokens=1, is_error=True)
    assert await p95() == pytest.approx(1.22)
    assert (await client.get("/v1/prompts")).json()["data"][0]["usage"] is None


async def test_unused_soft_prompts_are_listed(client: httpx.AsyncClient, two: None) -> None:
    assert (await client.get("/v1/prompts?unused_for=3600")).json()["data"] == []
    assert (await client.get("/v1/prompts?unused_for=0")).status_code == 400


async def test_prune_spares_pinned_and_used_versions(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    for seed in range(5):
        (await client.post("/v1/prompts", **upload_parts("p", seed=seed))).raise_for_status()
    (await client.post("/v1/prompts/p/warm", json={"version": 2, "pin": True})).raise_for_status()
    await complete(client, model="p@3")
    body = {"keep": 1, "older_than": 0}
    assert (await client.post("/v1/prompts/p/prune", json={**body, "older_than": 60})).json()["versions"] == []
    planned = (await client.post("/v1/prompts/p/prune", json={**body, "dry_run": True})).json()
    assert (planned["versions"], planned["dry_run"]) == ([1, 4], True)
    assert (await client.get("/v1/prompts/p")).json()["num_versions"] == 5
    done = (await client.post("/v1/prompts/p/prune", json={**body, "reason": "old"})).json()
    assert (done["versions"], done["dry_run"]) == ([1, 4], False)
    history = (await client.get("/v1/history?action=delete_version")).json()["data"]
    assert [(entry["version"], entry["reason"]) for entry in history] == [(4, "old"), (1, "old")]
    for wrong in ({"keep": 0, "older_than": 0}, {"keep": 1}, {"keep": 1, "older_than": -1}):
        assert (await client.post("/v1/prompts/p/prune", json=wrong)).status_code == 400


@pytest.fixture
async def named(make_app: MakeApp, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose base has another name too."""
    store = replace(settings.store, base_alias=("org/Other-Base",))
    async with ready(make_app(replace(settings, store=store))) as http:
        yield http


async def test_the_base_has_further_names(named: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    def parts(base: str, **fields: str) -> dict[str, Any]:
        made = upload_parts("p", **fields)
        config = json.loads(made["files"][0][1][1]) | {"base_model_name_or_path": base}
        made["files"][0] = ("files", ("adapter_config.json", json.dumps(config)))
        return made

    accepted = await named.post("/v1/prompts", **parts("/data/other-base"))
    assert (accepted.status_code, accepted.json()["overrides"]) == (201, {})
    refused = await named.post("/v1/prompts", **parts("unknown"))
    assert refused.json()["error"]["details"][0]["code"] == "base_model_mismatch"
    forced = await named.post("/v1/prompts", **parts("unknown", allow_other_base="true"))
    assert forced.json()["overrides"] == {"allow_other_base": True}


async def test_an_upload_with_a_number_is_an_import(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    fields = {"version": "7", "created_at": "1000", "created_by": "key-there"}
    for status in (201, 200):
        response = await client.post("/v1/prompts", **upload_parts("p", **fields))
        body = response.json()
        assert (response.status_code, body["version"], body["created_at"]) == (status, 7, 1000)
        assert body["created_by"] == "key-there"
    assert (await client.get("/v1/prompts/p")).json()["aliases"] == {}
    other = await client.post("/v1/prompts", **upload_parts("p", seed=1, **fields))
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    future = await client.post("/v1/prompts", **upload_parts("p", seed=1, version="8", created_at=str(2**36)))
    assert future.json()["created_at"] <= time.time()
    for wrong in ({"version": "0"}, {"version": "x"}, {"created_at": "-1"}, {"created_by": "a\nb"}):
        response = await client.post("/v1/prompts", **upload_parts("q", **wrong))
        assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(wrong)))
    entry = {"action": "promote", "alias": "latest", "version": 7, "created_at": 2000, "actor": "key-there"}
    body = {"history": [entry, {"action": "unheard", "created_at": 1}], "aliases": {"latest": 7, "lost": 3}}
    reply = (await client.post("/v1/prompts/p/import", json=body)).json()
    assert (reply["aliases"], reply["missing_aliases"]) == ({"latest": 7}, ["lost"])
    assert (reply["num_entries"], reply["skipped_entries"]) == (1, 1)
    again = (await client.post("/v1/prompts/p/import", json=body)).json()
    assert (again["aliases"], again["num_entries"]) == ({}, 0)
    found = [one for one in (await client.get("/v1/prompts/p/history")).json()["data"] if one["imported"]]
    assert [(one["action"], one["actor"], one["created_at"]) for one in found] == [("promote", "key-there", 2000)]
    assert (await client.post("/v1/prompts/none/import", json={})).status_code == 404
    assert (await client.post("/v1/prompts/p/import", json={"aliases": {"7": 7}})).status_code == 400
