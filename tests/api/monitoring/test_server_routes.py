"""What the server and a caller are."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import lifecycle_of
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import started
from tests.support.keyed import bearer, key_entry
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("still_clock")]

KEYS = key_entry("admin", tenant="", scopes=["admin"]) + key_entry(
    "limited", tenant="acme", requests_per_minute=10, tokens_per_minute=1000, max_concurrency=2
)


async def server(client: httpx.AsyncClient, key: str = "admin") -> dict[str, Any]:
    response = await client.get("/v1/server", headers=bearer(key))
    assert response.status_code == 200
    body: dict[str, Any] = response.json()
    return body


async def test_the_server_describes_itself(client: httpx.AsyncClient) -> None:
    found = await server(client)
    assert found["version"] == metadata.version("prelude-server")
    assert (found["phase"], found["reason"], found["has_keys"]) == ("serving", None, True)
    assert found["started_at"] <= found["since"]
    model = found["model"]
    assert (model["id"], model["architecture"], model["dtype"]) == ("tiny", "TinyForCausalLM", "float32")
    assert model["has_chat_template"] is True
    assert (found["limits"]["max_model_len"], found["limits"]["max_wait_seconds"]) == (256, None)
    assert found["kv_cache"] == {"num_blocks": 10, "block_size": 16, "bytes": 40960}
    assert (found["store"]["kind"], found["store"]["catalog"]) == ("directory", "sqlite")
    assert found["store"]["is_available"] is True
    assert "adapters" in found["features"]
    assert found["links"]["console"] == "/console"
    assert (await client.get("/v1/server")).status_code == 401
    assert found == await server(client, "limited")


async def test_the_server_answers_while_it_loads(app: FastAPI, engine: FakeEngine) -> None:
    engine.start_gate.clear()
    async with started(app) as client:
        found = await server(client)
        assert (found["phase"], found["reason"]) == ("loading", "the model is still being loaded")
        assert (found["kv_cache"], found["features"], found["model"]["dtype"]) == (None, [], None)
        assert (await client.get("/v1/models", headers=bearer("limited"))).status_code == 503
        engine.start_gate.set()

        async def serves() -> bool:
            return bool((await server(client))["phase"] == "serving")

        await until(serves)


async def test_the_server_says_why_it_does_not_serve(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    engine.outage, engine.since = "the engine process was killed", 2e9
    found = await server(client)
    assert (found["phase"], found["since"]) == ("restarting", 2_000_000_000)
    assert found["reason"] == "engine restarting: the engine process was killed"
    engine.outage, engine.alive = None, False
    assert (await server(client))["phase"] == "failed"
    engine.alive = True
    assert (await server(client))["phase"] == "serving"
    lifecycle_of(app).drain()
    found = await server(client)
    assert (found["phase"], found["reason"]) == ("draining", "the server is shutting down")
    assert found["since"] < 2e9


async def test_a_caller_sees_its_key_and_what_is_left(client: httpx.AsyncClient) -> None:
    body = {"prompt": "abc", "max_tokens": 2}
    assert (await client.post("/v1/completions", json=body, headers=bearer("limited"))).status_code == 200
    me = (await client.get("/v1/me", headers=bearer("limited"))).json()
    assert (me["tenant"], me["name"]) == ("acme", None)
    assert me["key"].startswith("key-")
    assert me["scopes"] == ["generate", "prompts:read", "prompts:write"]
    assert me["limits"]["requests_per_minute"] == {"limit": 10, "remaining": 9, "reset_seconds": 6.0}
    assert me["limits"]["tokens_per_minute"]["remaining"] == 994  # the beginning of the text is a token
    assert me["limits"]["max_concurrency"] == {"limit": 2, "remaining": 2}
    admin = (await client.get("/v1/me", headers=bearer("admin"))).json()
    assert admin["limits"] == {"requests_per_minute": None, "tokens_per_minute": None, "max_concurrency": None}
    assert (admin["tenant"], admin["scopes"]) == (admin["key"], ["admin"])
