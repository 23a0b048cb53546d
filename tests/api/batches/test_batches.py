"""OpenAI's files and batches, from the upload to the answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.batches import runner as batch_runner
from server.api.batches import storage as batch_storage
from server.config import Settings
from tests.support.api_fixtures import MakeApp
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import ready
from tests.support.keyed import locked
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ENDPOINT = "/v1/completions"


def row(name: str, *, url: str = ENDPOINT, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"prompt": name, "max_tokens": 3} | body}


async def upload(client: httpx.AsyncClient, rows: list[Any], **options: Any) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows)
    files = {"file": ("rows.jsonl", text.encode())}
    response = await client.post("/v1/files", data={"purpose": "batch"}, files=files, **options)
    assert response.status_code == 200, response.text
    file_id: str = response.json()["id"]
    return file_id


async def start(client: httpx.AsyncClient, file_id: str, **options: Any) -> dict[str, Any]:
    fields = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    response = await client.post("/v1/batches", json=fields | options)
    assert response.status_code == 200, response.text
    batch: dict[str, Any] = response.json()
    return batch


async def ended(client: httpx.AsyncClient, batch: dict[str, Any]) -> dict[str, Any]:
    for _ in range(2000):
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        await asyncio.sleep(0.005)
    raise AssertionError(f"the batch did not end: {batch}")


async def has_answers(client: httpx.AsyncClient, batch: dict[str, Any], count: int) -> bool:
    found = (await client.get(f"/v1/batches/{batch['id']}")).json()
    return bool(found["request_counts"]["completed"] >= count)


async def lines(client: httpx.AsyncClient, file_id: str | None) -> dict[str, Any]:
    """The lines of a result, by custom id."""
    if file_id is None:
        return {}
    text = (await client.get(f"/v1/files/{file_id}/content")).text
    return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


async def test_a_batch_answers_every_request_in_the_batch_tier(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    file_id = await upload(client, [row("a"), "", row("b"), row("c", model="nothing")])
    batch = await start(client, file_id, metadata={"job": "nightly"})
    assert (batch["status"], batch["metadata"], batch["object"]) == ("validating", {"job": "nightly"}, "batch")
    batch = await ended(client, batch)
    assert (batch["status"], batch["errors"]) == ("completed", None)
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    answers, errors = await lines(client, batch["output_file_id"]), await lines(client, batch["error_file_id"])
    assert (sorted(answers), sorted(errors)) == (["a", "b"], ["c"])
    assert answers["a"]["response"]["status_code"] == 200
    assert answers["a"]["response"]["body"]["choices"][0]["text"] == "hel"
    assert errors["c"]["response"]["status_code"] == 404
    assert errors["c"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert all(request.is_batch for request in engine.requests)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/classify", {"input": "a", "labels": ["b", "c"]}),
    ],
)
async def test_a_batch_may_be_of_chats_or_classifications(
    client: httpx.AsyncClient, endpoint: str, body: dict[str, Any]
) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    batch = await ended(client, await start(client, await upload(client, [line]), endpoint=endpoint))
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


@pytest.mark.parametrize(
    ("rows", "message", "line"),
    [
        ([], "no requests", None),
        ([row("a"), "{"], "not JSON", 2),
        (["[]"], "not a JSON object", 1),
        ([row("a"), row("a")], "used twice", 2),
        ([row("")], "custom_id must be", 1),
        ([row("a", url="/v1/models")], "url must be", 1),
        ([row("a") | {"method": "GET"}], "method must be POST", 1),
        ([row("a") | {"body": []}], "body must be", 1),
        ([row("a", stream=True)], "stream must not be true", 1),
    ],
)
async def test_a_file_that_is_not_of_requests_fails(
    client: httpx.AsyncClient, engine: FakeEngine, rows: list[Any], message: str, line: int | None
) -> None:
    batch = await ended(client, await start(client, await upload(client, rows)))
    (fault,) = batch["errors"]["data"]
    assert (batch["status"], fault["line"]) == ("failed", line)
    assert message in fault["message"]
    assert engine.requests == []


async def test_the_sizes_of_a_file_are_bounded(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MAX_ROWS", 2)
    monkeypatch.setattr(batch_runner, "MAX_LINE_BYTES", 150)
    batch = await ended(client, await start(client, await upload(client, [row("a"), row("b"), row("c")])))
    assert "more than 2 requests" in batch["errors"]["data"][0]["message"]
    batch = await ended(client, await start(client, await upload(client, [row("a", stop="x" * 200)])))
    assert "longer than 150 bytes" in batch["errors"]["data"][0]["message"]


async def test_a_batch_can_be_cancelled_and_keeps_its_answers(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.step_seconds = 0.01
    batch = await start(client, await upload(client, [row(f"r{number}") for number in range(200)]))
    await until(lambda: has_answers(client, batch, 1))
    await client.post(f"/v1/batches/{batch['id']}/cancel")
    batch = await ended(client, batch)
    counts = batch["request_counts"]
    assert batch["status"] == "cancelled"
    assert 0 < counts["completed"] < 200
    assert len(await lines(client, batch["output_file_id"])) == counts["completed"]
    again = await client.post(f"/v1/batches/{batch['id']}/cancel")
    assert again.json()["status"] == "cancelled"
    await asyncio.sleep(0.05)
    assert engine.in_flight == 0


async def test_a_batch_goes_on_after_a_restart(make_app: MakeApp, settings: Settings, engine: FakeEngine) -> None:
    engine.step_seconds = 0.01
    async with ready(make_app(settings)) as client:
        batch = await start(client, await upload(client, [row(f"r{number}") for number in range(60)]))
        await until(lambda: has_answers(client, batch, 5))
    growing = Path(settings.store.location) / "batches" / "batches" / batch["id"] / "output.jsonl"
    answered = growing.read_bytes().count(b"\n")
    assert 5 <= answered < 60
    with growing.open("ab") as file:
        file.write(b'{"custom_id": "r59", "resp')  # cut off by a crash
    before = len(engine.requests)
    engine.draining, engine.step_seconds = False, 0.0
    async with ready(make_app(settings)) as client:
        batch = await ended(client, batch)
        assert batch["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
        assert len(await lines(client, batch["output_file_id"])) == 60
    assert len(engine.requests) - before == 60 - answered


async def test_a_batch_expires(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.batches.routes.WINDOW_SECONDS", 1)
    engine.stall_after = 1
    batch = await ended(client, await start(client, await upload(client, [row("a")])))
    assert batch["status"] == "expired"


async def test_requests_wait_while_the_server_is_full(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    services = app.state.services
    with services.batch_admission.permits(services.batch_admission.capacity):
        batch = await start(client, await upload(client, [row("a")]))
        await asyncio.sleep(0.2)
        assert (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] == "in_progress"
    assert (await ended(client, batch))["request_counts"]["completed"] == 1


async def test_files_are_listed_read_and_deleted(client: httpx.AsyncClient) -> None:
    ids = [await upload(client, [row(name)]) for name in "abc"]
    listed = (await client.get("/v1/files")).json()
    assert sorted(file["id"] for file in listed["data"]) == sorted(ids)
    assert {file["purpose"] for file in listed["data"]} == {"batch"}
    page = (await client.get("/v1/files?limit=2")).json()
    assert (len(page["data"]), page["has_more"], page["last_id"]) == (2, True, page["data"][1]["id"])
    rest = (await client.get(f"/v1/files?after={page['last_id']}")).json()
    assert (len(rest["data"]), rest["has_more"]) == (1, False)
    assert (await client.get("/v1/files?purpose=batch_output")).json()["data"] == []
    assert (await client.get("/v1/files?after=file-0")).status_code == 400
    assert json.loads((await client.get(f"/v1/files/{ids[0]}/content")).text) == row("a")
    assert (await client.get(f"/v1/files/{ids[0]}")).json()["filename"] == "rows.jsonl"
    assert (await client.delete(f"/v1/files/{ids[0]}")).json() == {"id": ids[0], "object": "file", "deleted": True}
    for path in (f"/v1/files/{ids[0]}", f"/v1/files/{ids[0]}/content", "/v1/files/..%2Fbatches", "/v1/batches/x"):
        assert (await client.get(path)).status_code == 404


async def test_the_input_of_a_running_batch_cannot_be_deleted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stall_after = 1
    file_id = await upload(client, [row("a")])
    batch = await start(client, file_id)
    refused = await client.delete(f"/v1/files/{file_id}")
    assert (refused.status_code, "not over" in refused.text) == (400, True)
    await client.post(f"/v1/batches/{batch['id']}/cancel")
    assert (await ended(client, batch))["status"] == "cancelled"
    assert (await client.delete(f"/v1/files/{file_id}")).status_code == 200


async def test_a_batch_of_a_missing_file_is_refused(client: httpx.AsyncClient) -> None:
    fields = {"input_file_id": "file-" + "0" * 32, "endpoint": ENDPOINT, "completion_window": "24h"}
    assert (await client.post("/v1/batches", json=fields)).status_code == 404
    for wrong in ({"endpoint": "/v1/models"}, {"completion_window": "1h"}, {"metadata": {"a": "x" * 600}}):
        assert (await client.post("/v1/batches", json=fields | wrong)).status_code == 400


@pytest.mark.parametrize(
    ("data", "files", "status"),
    [
        ({"purpose": "fine-tune"}, {"file": ("a", b"{}")}, 400),
        ({"purpose": "batch"}, {"other": ("a", b"{}")}, 400),
        ({"purpose": "batch", "file": "text"}, None, 415),
    ],
)
async def test_an_upload_needs_a_file_and_a_purpose(
    client: httpx.AsyncClient, data: dict[str, str], files: Any, status: int
) -> None:
    assert (await client.post("/v1/files", data=data, files=files)).status_code == status


async def test_a_broken_upload_is_refused_and_leaves_nothing(
    client: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert (await client.post("/v1/files", content=b"nonsense", headers=headers)).status_code == 400
    headers = {"content-type": "multipart/form-data"}
    assert (await client.post("/v1/files", content=b"nonsense", headers=headers)).status_code == 400
    monkeypatch.setattr("server.api.batches.routes.MAX_FILE_BYTES", 10)
    files = {"file": ("rows.jsonl", b"x" * 11)}
    assert (await client.post("/v1/files", data={"purpose": "batch"}, files=files)).status_code == 413
    files = {"file": ("rows.jsonl", b"x" * 100_000)}
    assert (await client.post("/v1/files", data={"purpose": "batch"}, files=files)).status_code == 413
    assert (await client.get("/v1/files")).json()["data"] == []


async def test_the_files_of_a_tenant_are_bounded(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"file": ("rows.jsonl", b"x" * 100)}
    monkeypatch.setattr(batch_storage, "MAX_TENANT_BYTES", 150)
    assert (await client.post("/v1/files", data={"purpose": "batch"}, files=files)).status_code == 200
    assert (await client.post("/v1/files", data={"purpose": "batch"}, files=files)).status_code == 413
    monkeypatch.setattr(batch_storage, "MAX_FILES", 1)
    assert (await client.post("/v1/files", data={"purpose": "batch"}, files=files)).status_code == 400


KEYS_OF_TWO = """
[[keys]]
key = "first"
tenant = "one"
scopes = ["generate"]

[[keys]]
key = "second"
tenant = "two"
scopes = ["generate"]
"""


async def test_tenants_see_only_their_own_batches(
    make_app: MakeApp, settings: Settings, engine: FakeEngine, tmp_path: Path
) -> None:
    app = locked(make_app, settings, tmp_path / "keys.toml", KEYS_OF_TWO)
    async with ready(app) as client:
        client.headers["authorization"] = "Bearer first"
        file_id = await upload(client, [row("a")])
        batch = await ended(client, await start(client, file_id))
        assert batch["request_counts"]["completed"] == 1
        assert engine.requests[-1].salt == "one"
        client.headers["authorization"] = "Bearer second"
        for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{batch['id']}"):
            assert (await client.get(path)).status_code == 404
        assert (await client.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 404
        assert (await client.delete(f"/v1/files/{file_id}")).status_code == 404
        for path in ("/v1/files", "/v1/batches"):
            assert (await client.get(path)).json()["data"] == []
        fields = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
        assert (await client.post("/v1/batches", json=fields)).status_code == 404


async def test_a_batch_of_a_revoked_key_fails(
    make_app: MakeApp, settings: Settings, engine: FakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    engine.stall_after = 1
    async with ready(locked(make_app, settings, path, KEYS_OF_TWO)) as client:
        client.headers["authorization"] = "Bearer first"
        batch = await start(client, await upload(client, [row("a")]))
        await until(lambda: bool(engine.requests))
    engine.draining, engine.stall_after = False, None
    rest = KEYS_OF_TWO.replace('"first"', '"third"')
    async with ready(locked(make_app, settings, path, rest)) as client:
        client.headers["authorization"] = "Bearer third"
        batch = await ended(client, batch)
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "key_revoked")
