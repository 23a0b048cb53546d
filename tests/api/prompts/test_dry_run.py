"""Uploads that store nothing, and faults of text fields and files together."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.errors import NotFiniteError
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry

pytestmark = pytest.mark.anyio

KEYS = key_entry("a1", tenant="a") + key_entry("b1", tenant="b")
A, B = bearer("a1"), bearer("b1")


async def send(client: httpx.AsyncClient, parts: dict[str, Any], **fields: str) -> httpx.Response:
    data = {name: value for name, value in (parts["data"] | fields).items() if value is not None}
    return await client.post("/v1/prompts", data=data, files=parts["files"], headers=A)


async def test_a_dry_run_says_what_would_be_stored(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    parts = upload_parts("task", rows=20)
    dry = await send(client, parts, dry_run="true")
    assert dry.status_code == 200, dry.text
    found = dry.json()
    assert (found["object"], found["id"], found["kind"]) == ("prompt.dry_run", "task", "soft_prompt")
    assert (found["peft_type"], found["num_virtual_tokens"], found["blocks"]) == ("PROMPT_TUNING", 20, 2)
    assert (found["existing_version"], found["same_bytes"], found["warnings"]) == (None, [], [])
    assert (await client.get("/v1/prompts", headers=A)).json()["data"] == []
    assert (await client.get("/v1/prompts/task", headers=A)).status_code == 404
    real = (await send(client, parts)).json()
    for field in ("digest", "size", "files", "dtype", "task_type", "num_virtual_tokens"):
        assert real[field] == found[field]
    assert (await client.get("/v1/prompts/task", headers=A)).json()["aliases"] == {"latest": 1}


async def test_a_dry_run_needs_no_name_and_finds_the_same_bytes(
    client: httpx.AsyncClient, upload_parts: UploadParts
) -> None:
    parts = upload_parts("task")
    assert (await send(client, parts)).status_code == 201
    again = (await send(client, parts, dry_run="true", tags="new")).json()
    assert (again["existing_version"], again["same_bytes"]) == (1, [])
    unnamed = parts | {"data": {}}
    found = (await send(client, unnamed, dry_run="true")).json()
    assert (found["id"], found["existing_version"], found["same_bytes"]) == (None, None, ["task@1"])
    assert found["warnings"] == ["task@1 has the same bytes"]
    other = await client.post("/v1/prompts", data={"dry_run": "true"}, files=parts["files"], headers=B)
    assert other.json()["same_bytes"] == [], "another tenant's name was shown"
    assert (await client.get("/v1/prompts/task", headers=A)).json()["latest"]["tags"] == []
    assert (await send(client, unnamed)).json()["error"]["param"] == "id"


async def test_a_dry_run_has_the_errors_of_a_real_upload(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine, app: FastAPI
) -> None:
    assert (await send(client, upload_parts("task"))).status_code == 201
    refused = [
        (upload_parts("wide", width=9), A),
        (upload_parts("tiny"), A),
        (upload_parts("task", seed=1), B),
        (upload_parts("late", over="ghost@1"), A),
        (upload_parts("late", alias="7"), A),
        (upload_parts("late", shared="true"), A),
        ({"data": {"id": "none"}, "files": upload_parts("none")["files"][:1]}, A),
    ]
    for parts, headers in refused:
        answers = [
            await client.post("/v1/prompts", data=parts["data"] | extra, files=parts["files"], headers=headers)
            for extra in ({"dry_run": "true"}, {})
        ]
        assert answers[0].status_code == answers[1].status_code >= 400
        assert answers[0].json() == answers[1].json()


async def test_the_model_tries_the_files(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    engine.probe_failures[None] = NotFiniteError("the model computed NaN")
    response = await send(client, upload_parts("task"), dry_run="true")
    assert response.status_code == 400
    assert response.json()["error"]["details"][0]["code"] == "not_finite_in_model"


@pytest.mark.parametrize("dry_run", ["true", "false"])
async def test_faults_of_fields_and_files_come_together(
    client: httpx.AsyncClient, upload_parts: UploadParts, dry_run: str
) -> None:
    parts = upload_parts("task", width=9)
    response = await send(client, parts, metadata="{", alias="Bad Alias", lineage="[]", dry_run=dry_run)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "invalid_prompt"
    places = [(fault["code"], fault["file"], fault["field"]) for fault in error["details"]]
    assert places[-3:] == [("invalid_field", None, name) for name in ("alias", "metadata", "lineage")]
    assert places[0][1] == "adapter_config.json" or places[0][1] == "adapter_model.safetensors"


async def test_faults_of_fields_alone_are_listed(client: httpx.AsyncClient, upload_parts: UploadParts) -> None:
    response = await send(client, upload_parts("task"), metadata="{", alias="Bad Alias", dry_run="perhaps")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", "alias")
    assert [fault["field"] for fault in error["details"]] == ["alias", "metadata", "dry_run"]
    assert error["message"] == error["details"][0]["message"]
