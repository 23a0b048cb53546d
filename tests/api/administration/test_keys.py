"""``GET /v1/keys`` and the use in lists: what administrators see, and what tenants do not."""

from __future__ import annotations

import hashlib

import httpx
import pytest
from fastapi import FastAPI

from server.api.keys.keys import Reload
from server.api.services import Services
from tests.support.api_fixtures import UploadParts

pytestmark = pytest.mark.anyio

KEYS = """
[[keys]]
key = "root-key-0123456789"
name = "root"
scopes = ["admin", "generate", "prompts:read", "prompts:write"]
tenant = "ops"

[[keys]]
key = "acme-key-0123456789"
scopes = ["generate", "prompts:read", "prompts:write"]
tenant = "acme"
requests_per_minute = 600
max_concurrency = 3
"""
ROOT = {"authorization": "Bearer root-key-0123456789"}
ACME = {"authorization": "Bearer acme-key-0123456789"}


async def test_keys_are_listed_without_secrets(client: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await client.get("/v1/models", headers=ACME)).status_code == 200
    response = await client.get("/v1/keys", headers=ROOT)
    root, acme = response.json()["data"]
    digest = hashlib.sha256(b"acme-key-0123456789").hexdigest()
    assert acme == {
        "object": "key",
        "id": f"key-{digest[:12]}",
        "name": None,
        "tenant": "acme",
        "scopes": ["generate", "prompts:read", "prompts:write"],
        "limits": {"requests_per_minute": 600, "tokens_per_minute": None, "max_concurrency": 3},
        "running": 0,
        "requests": 1,
        "last_used_at": acme["last_used_at"],
    }
    assert acme["last_used_at"] > 1_600_000_000
    assert (root["name"], root["tenant"], root["requests"]) == ("root", "ops", 1)
    assert digest not in response.text
    assert "0123456789" not in response.text
    assert response.json()["last_reload"] is None
    services: Services = app.state.services
    assert services.api_keys is not None
    services.api_keys.last_reload = Reload(1_700_000_000.5, "line 3 is not valid")
    reload = (await client.get("/v1/keys", headers=ROOT)).json()["last_reload"]
    assert reload == {"at": 1_700_000_000, "error": "line 3 is not valid"}


async def test_only_administrators_see_keys(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/keys", headers=ACME)).status_code == 403
    assert (await client.get("/v1/keys")).status_code == 401


async def test_a_list_has_the_use_of_what_the_caller_may_change(
    client: httpx.AsyncClient, upload_parts: UploadParts
) -> None:
    for seed in range(2):
        (await client.post("/v1/prompts", **upload_parts("own", seed=seed), headers=ACME)).raise_for_status()
    shared = upload_parts("shared", shared="true")
    (await client.post("/v1/prompts", **shared, headers=ROOT)).raise_for_status()
    for model in ("own@1", "own@2", "shared"):
        body = {"model": model, "prompt": "abc", "max_tokens": 2}
        (await client.post("/v1/completions", json=body, headers=ACME)).raise_for_status()

    async def use(headers: dict[str, str], **params: str) -> dict[str, int | None]:
        data = (await client.get("/v1/prompts", params=params, headers=headers)).json()["data"]
        return {one["id"]: one["usage"] and one["usage"]["requests"] for one in data}

    assert await use(ACME) == {"own": None, "shared": None}
    assert await use(ACME, include="usage") == {"own": 2, "shared": None}  # its use is that of all tenants
    assert await use(ROOT, include="usage") == {"shared": 1}
    assert await use(ROOT, include="usage", all_tenants="true") == {"own": 2, "shared": 1}
    assert (await client.get("/v1/prompts?include=texts", headers=ACME)).status_code == 400


async def test_another_tenants_versions_are_not_compared(
    client: httpx.AsyncClient, upload_parts: UploadParts
) -> None:
    for seed in range(2):
        (await client.post("/v1/prompts", **upload_parts("own", seed=seed), headers=ACME)).raise_for_status()
    path = "/v1/prompts/own/diff?from=1&to=2"
    assert (await client.get(path, headers=ACME)).status_code == 200
    assert (await client.get(path, headers=ROOT)).status_code == 404
    assert (await client.get(f"{path}&all_tenants=true", headers=ROOT)).status_code == 200
    history = (await client.get("/v1/prompts/own/history", headers=ACME)).json()["data"]
    assert {"read": "diff"} in [entry["details"] for entry in history]
