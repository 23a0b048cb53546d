"""A tenant's soft prompts are visible to its keys and to no other tenant."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.api.keys.callers import Scope
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry
from tests.support.operations import OPERATIONS

pytestmark = pytest.mark.anyio

KEYS = "".join(
    [
        key_entry("a1", tenant="a"),
        key_entry("a2", tenant="a", scopes=["generate", "prompts:read"]),
        key_entry("b1", tenant="b"),
        key_entry("root", tenant="", scopes=["generate", "prompts:read", "prompts:write", "admin"]),
    ]
)


@pytest.fixture
async def prompts(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    """``mine`` belongs to tenant a, ``ours`` is shared."""
    for name, key, fields in (("mine", "a1", {}), ("ours", "root", {"shared": "true"})):
        parts = upload_parts(name, tags="t", **fields)
        response = await client.post("/v1/prompts", headers=bearer(key), **parts)
        assert response.status_code == 201
        assert response.json()["shared"] == (name == "ours")


@pytest.mark.parametrize("is_known", [False, True], ids=["cold", "in the cache"])
async def test_another_tenants_soft_prompt_looks_missing(
    client: httpx.AsyncClient, prompts: None, is_known: bool
) -> None:
    """Every route with a name gives the same answer for another tenant's name as for an unknown one."""
    bodies: dict[str, dict[str, Any]] = {"PUT": {"version": 1}, "POST": {"keep": 1, "older_than": 0}, "PATCH": {}}
    routes = [
        (method, path)
        for (method, path), operation in OPERATIONS.by_route.items()
        if ("{id}" in path or "{model_id" in path) and operation.scopes != {Scope.ADMIN}
    ]
    assert len(routes) > 10
    if is_known:
        await client.post("/v1/completions", json={"model": "mine", "prompt": "x"}, headers=bearer("a1"))
    for method, path in routes:
        values = {"{version}": "1", "{filename}": "adapter_config.json", "{alias}": "latest"}
        url = path.replace("{model_id:path}", "{id}") + ("?to=1" if path.endswith("/diff") else "")
        for part, value in values.items():
            url = url.replace(part, value)
        answers = []
        for name in ("mine", "ghost"):
            response = await client.request(
                method, url.replace("{id}", name), headers=bearer("b1"), json=bodies.get(method)
            )
            answers.append((response.status_code, response.text.replace(name, "NAME")))
        assert answers[0] == answers[1], (method, path)
        assert answers[0][0] == 404, (method, path)
    assert (await client.get("/v1/prompts/mine", headers=bearer("a2"))).json()["aliases"] == {"latest": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/classify", {"input": "x", "labels": ["a", "b"]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_another_tenants_soft_prompt_cannot_be_used(
    client: httpx.AsyncClient, prompts: None, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    for naming in ({"model": "mine"}, {"model": "mine@1"}, {"prompt_id": "mine"}):
        for key, status in (("a1", 200), ("b1", 404), ("root", 404), ("a2", 200)):
            response = await client.post(path, json=body | naming, headers=bearer(key))
            assert response.status_code == status, response.text
        unknown = await client.post(path, json=body | {"model": "ghost"}, headers=bearer("b1"))
        known = await client.post(path, json=body | {"model": "mine"}, headers=bearer("b1"))
        assert known.text == unknown.text.replace("ghost", "mine")


async def test_lists_show_own_and_shared_soft_prompts(client: httpx.AsyncClient, prompts: None) -> None:
    for key, names in (("a2", ["mine", "ours"]), ("b1", ["ours"]), ("root", ["ours"])):
        for path in ("/v1/prompts", "/v1/prompts?tag=t"):
            listed = (await client.get(path, headers=bearer(key))).json()["data"]
            assert [prompt["id"] for prompt in listed] == names
        models = (await client.get("/v1/models", headers=bearer(key))).json()["data"]
        assert [model["id"] for model in models][1:] == names


async def test_a_taken_name_is_a_conflict_without_details(
    client: httpx.AsyncClient, prompts: None, upload_parts: UploadParts
) -> None:
    for key, fields in (("b1", {}), ("root", {}), ("root", {"shared": "true"})):
        response = await client.post("/v1/prompts", headers=bearer(key), **upload_parts("mine", seed=1, **fields))
        assert response.status_code == 409
        assert response.json()["error"]["message"] == "the name 'mine' is taken"
    response = await client.post("/v1/prompts", headers=bearer("a1"), **upload_parts("ours", seed=1))
    assert response.status_code == 409
    assert "shared" in response.json()["error"]["message"]


async def test_shared_soft_prompts_are_changed_by_admins_only(
    client: httpx.AsyncClient, prompts: None, upload_parts: UploadParts
) -> None:
    refused = [
        await client.post("/v1/prompts", headers=bearer("a1"), **upload_parts("ours", seed=1, shared="true")),
        await client.put("/v1/prompts/ours/aliases/x", json={"version": 1}, headers=bearer("a1")),
        await client.delete("/v1/prompts/ours", headers=bearer("a1")),
        await client.delete("/v1/prompts/ours/versions/1", headers=bearer("a1")),
        await client.post("/v1/prompts/ours/warm", json={"pin": True}, headers=bearer("a1")),
    ]
    assert [response.status_code for response in refused] == [403] * len(refused)
    assert {response.json()["error"]["code"] for response in refused} == {"insufficient_scope"}
    assert (await client.post("/v1/prompts/ours/warm", headers=bearer("a1"))).status_code == 200
    changed = [
        await client.put("/v1/prompts/ours/aliases/x", json={"version": 1}, headers=bearer("root")),
        await client.post("/v1/prompts/ours/warm", json={"pin": True}, headers=bearer("root")),
        await client.post("/v1/prompts/mine/warm", json={"pin": True}, headers=bearer("a1")),
        await client.delete("/v1/prompts/ours", headers=bearer("root")),
    ]
    assert [response.status_code for response in changed] == [200] * len(changed)


async def test_shared_must_be_true_or_false(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    response = await client.post("/v1/prompts", headers=bearer("root"), **upload_parts("p", shared="yes"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "shared"


async def test_the_cache_salt_is_the_tenant(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for key in ("a1", "a2", "b1"):
        await client.post("/v1/completions", json={"prompt": "x"}, headers=bearer(key))
    assert [request.salt for request in engine.requests] == ["a", "a", "b"]
