"""``/v1/runs``: reports of trainings, their metrics, tenants, faults."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.support.keyed import bearer, key_entry

pytestmark = pytest.mark.anyio

KEYS = "".join(
    [
        key_entry("a1", tenant="a"),
        key_entry("b1", tenant="b"),
        key_entry("reader", tenant="a", scopes=["prompts:read"]),
        key_entry("sender", tenant="a", scopes=["generate"]),
    ]
)
RUN = "/v1/runs/run-" + "0" * 32
BODY: dict[str, Any] = {"prompt_id": "tone", "method": "prompt_tuning", "status": "running", "num_steps": 10}


@pytest.fixture(autouse=True)
def sends_key(client: httpx.AsyncClient) -> None:
    client.headers.update(bearer("a1"))


async def put(client: httpx.AsyncClient, path: str = RUN, **fields: Any) -> dict[str, Any]:
    response = await client.put(path, json=BODY | {"started_at": int(time.time())} | fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_a_run_is_reported_and_read(client: httpx.AsyncClient) -> None:
    found = await put(client, settings={"seed": 0})
    assert (found["status"], found["is_silent"], found["step"], found["version"]) == ("running", False, 0, None)
    points = [{"step": 1, "values": {"loss": 2.0}}, {"step": 2, "values": {"loss": 1.0, "eval_loss": 1.5}}]
    assert (await client.post(f"{RUN}/metrics", json={"data": points})).status_code == 204
    assert (await client.post(f"{RUN}/metrics", json={"data": points})).status_code == 204
    page = (await client.get(f"{RUN}/metrics", params={"limit": 1})).json()
    assert (page["data"], page["has_more"], page["last_step"]) == (points[:1], True, 1)
    assert (await client.get(f"{RUN}/metrics?after=1")).json()["data"] == points[1:]
    assert (await client.get(RUN)).json()["step"] == 2
    again = {"data": [{"step": 1, "values": {"loss": 3.0}}], "after_step": 0}
    assert (await client.post(f"{RUN}/metrics", json=again)).status_code == 204
    assert (await client.get(f"{RUN}/metrics")).json()["data"] == [{"step": 1, "values": {"loss": 3.0}}]
    end: dict[str, Any] = {
        "status": "completed",
        "golden_check": {"is_passed": True},
        "version": 2,
        "alias": "candidate",
        "step": 10,
    }
    found = await put(client, **end)
    assert found | end == found
    assert [one["id"] for one in (await client.get("/v1/runs?prompt_id=tone")).json()["data"]] == [found["id"]]
    assert (await client.get("/v1/runs?prompt_id=other")).json()["data"] == []
    assert (await client.delete(RUN)).json()["deleted"] is True
    assert (await client.get(RUN)).status_code == 404


async def test_a_run_that_stops_reporting_is_silent(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(client)
    monkeypatch.setattr("server.api.runs.bodies.SILENT_SECONDS", -1)
    assert (await client.get(RUN)).json()["is_silent"] is True
    assert (await put(client, status="interrupted"))["is_silent"] is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "done"}, "status"),
        ({"prompt_id": "A B"}, "prompt_id"),
        ({"step": -1}, "step"),
        ({"settings": {"x": "y" * 2_000}}, "settings has more than 1000 bytes"),
        ({"started_at": None}, "started_at"),
        ({"alias": "7"}, "alias"),
    ],
)
async def test_invalid_runs_are_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("server.api.runs.bodies.MAX_SETTINGS_BYTES", 1000)
    response = await client.put(RUN, json=BODY | {"started_at": 1} | fields)
    assert (response.status_code, message in response.text) == (400, True), response.text


async def test_invalid_ids_and_metrics_are_refused(client: httpx.AsyncClient) -> None:
    assert (await client.put("/v1/runs/mine", json=BODY | {"started_at": 1})).status_code == 400
    point = {"step": 1, "values": {"loss": 1.0}}
    assert (await client.post(f"{RUN}/metrics", json={"data": [point]})).status_code == 404
    await put(client)
    for data in ([], [point | {"values": {}}], [point | {"values": {"loss": "x"}}], [point] * 1001):
        assert (await client.post(f"{RUN}/metrics", json={"data": data})).status_code == 400
    nan = b'{"data": [{"step": 1, "values": {"loss": NaN}}]}'
    response = await client.post(f"{RUN}/metrics", content=nan, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert (await client.get("/v1/runs?after=run-9")).status_code == 400


async def test_tenants_and_scopes(client: httpx.AsyncClient) -> None:
    await put(client)
    body = BODY | {"started_at": 1}
    points = {"data": [{"step": 1, "values": {"loss": 1.0}}]}
    for key, read, write in (("b1", 404, 404), ("reader", 200, 403), ("sender", 403, 403)):
        headers = bearer(key)
        assert (await client.get(RUN, headers=headers)).status_code == read
        assert (await client.get(f"{RUN}/metrics", headers=headers)).status_code == read
        assert (await client.put(RUN, json=body, headers=headers)).status_code == write
        assert (await client.post(f"{RUN}/metrics", json=points, headers=headers)).status_code == write
        assert (await client.delete(RUN, headers=headers)).status_code == write
    assert (await client.get("/v1/runs", headers=bearer("b1"))).json()["data"] == []
