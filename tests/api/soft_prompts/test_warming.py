from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.config import Settings
from server.errors import EngineDeadError, RequestFailedError
from tests.support.api_fixtures import CountingStore, MakeApp, UploadParts, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import is_ready, ready, started
from tests.support.waiting import until

Push = Callable[..., Awaitable[dict[str, Any]]]

pytestmark = pytest.mark.anyio

URL = "/v1/prompts/sentiment/warm"


async def pinned(client: httpx.AsyncClient, name: str = "sentiment") -> Any:
    return (await client.get(f"/v1/prompts/{name}")).json()["pinned"]


def digests(engine: FakeEngine) -> list[str]:
    return sorted(engine.pinned)


@pytest.fixture
def push(client: httpx.AsyncClient, upload_parts: UploadParts) -> Push:
    async def push(name: str = "sentiment", **fields: Any) -> dict[str, Any]:
        response = await client.post("/v1/prompts", **upload_parts(name, **fields))
        version: dict[str, Any] = response.raise_for_status().json()
        return version

    return push


@pytest.mark.parametrize("arguments", [{}, {"json": {}}, {"json": None}, {"json": {"version": 1}}])
async def test_a_soft_prompt_can_be_warmed(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    sentiment: str,
    eventually: WaitUntil,
    arguments: dict[str, Any],
) -> None:
    response = await client.post(URL, **arguments)
    body = response.json()
    assert response.status_code == 200, response.text
    assert body.pop("seconds") >= 0
    assert body == {
        "object": "prompt.warmed",
        "id": "sentiment",
        "version": 1,
        "task_ids": None,
        "pinned": False,
    }
    assert [source.digest for source in engine.prepared] == [store.leased[0].version.digest]
    eventually(lambda: len(store.leased) == len(store.released) == 1)


async def test_versions_and_aliases_can_be_warmed(client: httpx.AsyncClient, push: Push, sentiment: str) -> None:
    await push(seed=1, alias="canary")
    for body, version in (({"version": 2}, 2), ({"alias": "canary"}, 2), ({"alias": "latest"}, 1)):
        assert (await client.post(URL, json=body)).json()["version"] == version


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"alias": "Bad"}, "alias"),
        ({"alias": "7"}, "alias"),
        ({"version": 1, "alias": "latest"}, "version"),
        ({"task_id": 0}, "task_id"),
        ({"task_id": -1}, "task_id"),
        ({"pin": "yes"}, "pin"),
        ({"pin": False, "task_id": 0}, "task_id"),
        ([], None),
    ],
)
async def test_bad_bodies_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str, body: dict[str, Any] | list[Any], param: str | None
) -> None:
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.prepared == []


async def test_a_body_that_is_not_json_is_refused(client: httpx.AsyncClient, sentiment: str) -> None:
    for headers in ({}, {"content-type": "text/plain"}):
        assert (await client.post(URL, content=b"{}", headers=headers)).status_code == 415
    assert (await client.post(URL, content=b"{", headers={"content-type": "application/json"})).status_code == 400


@pytest.mark.parametrize("body", [{"version": 9}, {"alias": "none"}, {"version": 9, "pin": False}])
async def test_missing_soft_prompts_are_404(client: httpx.AsyncClient, sentiment: str, body: dict[str, Any]) -> None:
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "prompt_not_found")


@pytest.mark.parametrize(
    ("failure", "status"), [(RequestFailedError("cannot be read"), 500), (EngineDeadError("ended"), 503)]
)
async def test_a_failed_request_pins_nothing(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    sentiment: str,
    eventually: WaitUntil,
    failure: Exception,
    status: int,
) -> None:
    engine.prepare_failure = failure
    assert (await client.post(URL, json={"pin": True})).status_code == status
    assert await pinned(client) == []
    assert engine.pinned == {}
    eventually(lambda: len(store.leased) == len(store.released) == 1)


async def test_a_full_or_draining_server_refuses_to_warm(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, sentiment: str
) -> None:
    with app.state.services.admission.permits(8):
        assert (await client.post(URL)).status_code == 429
    engine.draining = True
    assert (await client.post(URL)).status_code == 503


async def test_a_version_can_be_pinned_and_unpinned(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    push: Push,
    sentiment: str,
    eventually: WaitUntil,
) -> None:
    digest = (await client.get("/v1/prompts/sentiment/versions/1")).json()["digest"]
    assert (await client.post(URL, json={"pin": True})).json()["pinned"]
    assert (await client.post(URL, json={"pin": True, "version": 1})).json()["pinned"]
    assert (await client.post(URL)).json()["pinned"]  # the body does not mention pins, so the pin stays
    assert await pinned(client) == [1]
    await push(seed=1, alias="other")
    versions = (await client.get("/v1/prompts/sentiment/versions")).json()["data"]
    assert {version["version"]: version["pinned"] for version in versions} == {1: True, 2: False}
    assert (await client.get("/v1/prompts/sentiment/versions/1")).json()["pinned"]
    assert (await client.get("/v1/prompts")).json()["data"][0]["pinned"] == [1]
    assert digests(engine) == [digest]
    eventually(lambda: len(store.leased) - len(store.released) == 1)
    num_prepared = len(engine.prepared)
    for _ in range(2):
        reply = (await client.post(URL, json={"pin": False})).json()
        assert (reply["pinned"], reply["seconds"], reply["version"]) == (False, 0.0, 1)
    assert len(engine.prepared) == num_prepared
    assert await pinned(client) == []
    assert engine.pinned == {}
    eventually(lambda: len(store.leased) == len(store.released))


async def test_the_files_of_a_pinned_version_stay_until_it_is_deleted(
    client: httpx.AsyncClient, engine: FakeEngine, store: CountingStore, sentiment: str, eventually: WaitUntil
) -> None:
    await client.post(URL, json={"pin": True})
    path = store.leased[0].weights_path
    assert path.exists()
    store._collector.retention_seconds = 0  # the deletion is final
    (await client.delete("/v1/prompts/sentiment/versions/1?force=true")).raise_for_status()
    assert engine.pinned == {}
    eventually(lambda: not path.exists())


async def test_deleting_the_name_ends_all_its_pins(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    push: Push,
    sentiment: str,
    eventually: WaitUntil,
) -> None:
    await push(seed=1)
    for version in (1, 2):
        await client.post(URL, json={"pin": True, "version": version})
    assert await pinned(client) == [1, 2]
    (await client.delete("/v1/prompts/sentiment/versions/2?force=true")).raise_for_status()
    assert await pinned(client) == [1]
    await client.delete("/v1/prompts/sentiment")
    assert engine.pinned == {}
    eventually(lambda: len(store.leased) == len(store.released))
    await push()  # the new soft prompt's aliases are not followed
    assert await pinned(client) == []


async def test_deletion_during_pinning_leaves_no_pin(
    client: httpx.AsyncClient, engine: FakeEngine, store: CountingStore, sentiment: str, eventually: WaitUntil
) -> None:
    engine.step_seconds = 0.05
    warming = asyncio.create_task(client.post(URL, json={"pin": True}))
    await until(lambda: len(store.leased) == 1)
    await client.delete("/v1/prompts/sentiment")
    assert (await warming).status_code == 404
    assert engine.pinned == {}
    eventually(lambda: len(store.leased) == len(store.released))


async def test_the_same_bytes_under_two_names_share_a_pin(
    client: httpx.AsyncClient, engine: FakeEngine, push: Push
) -> None:
    for name in ("one", "two"):
        response = await push(name)
        await client.post(f"/v1/prompts/{name}/warm", json={"pin": True})
    assert digests(engine) == [response["digest"]]
    await client.post("/v1/prompts/one/warm", json={"pin": False})
    assert digests(engine) == [response["digest"]]
    await client.post("/v1/prompts/two/warm", json={"pin": False})
    assert engine.pinned == {}


async def test_tasks_can_be_warmed_and_pinned_one_by_one(
    client: httpx.AsyncClient, engine: FakeEngine, other_parts: UploadParts
) -> None:
    (await client.post("/v1/prompts", **other_parts("many"))).raise_for_status()
    url = "/v1/prompts/many/warm"
    assert (await client.post(url)).json()["task_ids"] == [0, 1, 2]
    assert [source.task_id for source in engine.prepared] == [0, 1, 2]
    assert (await client.post(url, json={"task_id": 1, "pin": True})).json()["task_ids"] == [1]
    assert [source.task_id for source in engine.pinned.values()] == [1]
    assert (await client.post(url, json={"pin": True})).json()["task_ids"] == [0, 1, 2]
    assert len(engine.pinned) == 3
    assert (await client.post(url, json={"pin": False, "task_id": 1})).json()["pinned"]
    assert {source.task_id for source in engine.pinned.values()} == {0, 2}
    assert not (await client.post(url, json={"pin": False})).json()["pinned"]
    assert engine.pinned == {}
    assert (await client.post(url, json={"task_id": 3})).status_code == 400


Settled = Callable[[], Awaitable[None]]


@pytest.fixture
def settled(app: FastAPI) -> Settled:
    """Wait until no promotion has to be followed."""
    warmer = app.state.services.warmer
    return lambda: until(lambda: not warmer._tasks)


async def test_a_pin_by_alias_follows_promotions(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    push: Push,
    sentiment: str,
    eventually: WaitUntil,
    settled: Settled,
) -> None:
    await client.post(URL, json={"pin": True})
    second = await push(seed=1)
    await until(lambda: digests(engine) == [second["digest"]])
    assert await pinned(client) == [2]
    await client.put("/v1/prompts/sentiment/aliases/canary", json={"version": 1})  # not followed
    await client.post("/v1/prompts/sentiment/aliases/latest/rollback", json={})
    await until(lambda: digests(engine) != [second["digest"]])
    assert await pinned(client) == [1]
    await client.put("/v1/prompts/sentiment/aliases/latest", json={"version": 2})
    await until(lambda: digests(engine) == [second["digest"]])
    await client.post(URL, json={"pin": False, "version": 2})  # also stops following the alias
    await client.put("/v1/prompts/sentiment/aliases/latest", json={"version": 1})
    await settled()
    assert engine.pinned == {}
    eventually(lambda: len(store.leased) == len(store.released))


async def test_a_version_pinned_by_number_stays_after_an_alias_moves(
    client: httpx.AsyncClient, push: Push, sentiment: str
) -> None:
    await client.post(URL, json={"pin": True})
    await client.post(URL, json={"pin": True, "version": 1})
    await push(seed=1)
    for _ in range(500):
        if await pinned(client) == [1, 2]:
            return
    pytest.fail("the promotion was not followed")


async def test_promotions_are_followed_in_order(
    client: httpx.AsyncClient, engine: FakeEngine, push: Push, sentiment: str, settled: Settled
) -> None:
    await client.post(URL, json={"pin": True})
    engine.step_seconds = 0.01
    for seed in (1, 2, 3):
        newest = await push(seed=seed)
    await settled()
    assert digests(engine) == [newest["digest"]]
    assert await pinned(client) == [4]


@pytest.mark.parametrize("has_begun", [False, True])
async def test_unpinning_during_a_promotion_leaves_no_pin(
    app: FastAPI,
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    push: Push,
    sentiment: str,
    eventually: WaitUntil,
    settled: Settled,
    has_begun: bool,
) -> None:
    await client.post(URL, json={"pin": True})
    engine.step_seconds = 0.05
    await push(seed=1)
    if has_begun:
        await until(app.state.services.warmer._follow_lock.locked)
    assert not (await client.post(URL, json={"pin": False})).json()["pinned"]
    await push(seed=2)
    await settled()
    assert engine.pinned == {}
    eventually(lambda: len(store.leased) == len(store.released))


async def test_changes_of_other_servers_are_followed(
    app: FastAPI,
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    push: Push,
    sentiment: str,
    eventually: WaitUntil,
) -> None:
    second = await push(seed=1, alias="canary")
    await client.post(URL, json={"pin": True})
    await client.post(URL, json={"pin": True, "version": 2})
    warmer = app.state.services.warmer
    store.set_alias("sentiment", "latest", 2)
    warmer.changed({"sentiment", "other"})
    await until(lambda: digests(engine) == [second["digest"]])
    store.set_alias("sentiment", "latest", 1)
    store.delete_version("sentiment", 2, force=True)  # with the alias canary
    warmer.changed(None)
    await until(lambda: warmer.pinned_versions("sentiment") == [1])
    store.delete_prompt("sentiment")
    warmer.changed({"sentiment"})
    await until(lambda: engine.pinned == {} or digests(engine) == [])
    eventually(lambda: len(store.leased) == len(store.released))


async def test_a_promotion_that_cannot_be_followed_is_a_warning(
    client: httpx.AsyncClient, engine: FakeEngine, push: Push, sentiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post(URL, json={"pin": True})
    engine.prepare_failure = RequestFailedError("no room")
    await push(seed=1)
    await until(lambda: "sentiment@latest cannot be pinned: no room" in caplog.text)
    assert await pinned(client) == [1]


def storing(settings: Settings, **store: Any) -> Settings:
    """Settings with others for the store."""
    return replace(settings, store=replace(settings.store, **store))


async def test_settings_are_applied_before_the_server_is_ready(
    make_app: MakeApp,
    settings: Settings,
    engine: FakeEngine,
    store: CountingStore,
    upload_parts: UploadParts,
    caplog: pytest.LogCaptureFixture,
    eventually: WaitUntil,
) -> None:
    async with ready(make_app(settings)) as http:
        for name in ("one", "two"):
            (await http.post("/v1/prompts", **upload_parts(name, seed=len(name) + ord(name[0])))).raise_for_status()
    engine.step_seconds = 0.02
    names = {"preload": ("one", "no-such", "Bad"), "pin": ("two@1", "two@9")}
    async with started(make_app(storing(settings, **names))) as http:
        while not engine.prepared:
            assert (await http.get("/ready")).status_code == 503
            await asyncio.sleep(0.002)
        await until(lambda: is_ready(http))
        assert len(engine.prepared) == 2
        assert await pinned(http, "one") == []
        assert await pinned(http, "two") == [1]
        assert "no-such@latest cannot be warmed" in caplog.text
        assert "Bad cannot be warmed" in caplog.text
        assert "two@9 cannot be pinned" in caplog.text
        # Both are followed if they were named by an alias.
        (await http.post("/v1/prompts", **upload_parts("one", seed=77))).raise_for_status()
        (await http.post("/v1/prompts", **upload_parts("no-such", seed=78))).raise_for_status()
        (await http.post("/v1/prompts", **upload_parts("two", seed=79))).raise_for_status()
        await until(lambda: len(engine.prepared) == 4)
        assert await pinned(http, "two") == [1]
    assert len(store.leased) == len(store.released)


async def test_the_server_can_be_stopped_during_preloading(
    make_app: MakeApp,
    settings: Settings,
    engine: FakeEngine,
    store: CountingStore,
    upload_parts: UploadParts,
    eventually: WaitUntil,
) -> None:
    async with ready(make_app(settings)) as http:
        (await http.post("/v1/prompts", **upload_parts("one"))).raise_for_status()
    engine.step_seconds = 60.0
    async with started(make_app(storing(settings, pin=("one",)))):
        await until(lambda: len(store.leased) == 1)
    assert len(store.leased) == len(store.released)


async def test_a_restarted_engine_gets_all_pins_again(
    make_app: MakeApp,
    settings: Settings,
    engine: FakeEngine,
    store: CountingStore,
    upload_parts: UploadParts,
    caplog: pytest.LogCaptureFixture,
    eventually: WaitUntil,
) -> None:
    async with ready(make_app(settings)) as http:
        for name in ("one", "two", "three"):
            (await http.post("/v1/prompts", **upload_parts(name, seed=len(name) + ord(name[0])))).raise_for_status()
    async with ready(make_app(storing(settings, preload=("one", "two@1"), pin=("three@1",)))) as http:
        lost = {source.digest for source in engine.prepared}
        assert len(lost) == 3
        engine.prepared.clear()
        engine.outage = "the engine process was ended by SIGKILL"
        response = await http.get("/ready")
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        error = response.json()["error"]
        assert (error["code"], error["message"]) == ("engine_restarting", f"engine restarting: {engine.outage}")
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 503
        engine.outage, engine.step_seconds = None, 0.02
        engine.on_restarted()
        response = await http.get("/ready")
        assert (response.status_code, "reloaded" in response.text) == (503, True)
        await until(lambda: is_ready(http))
        assert {source.digest for source in engine.prepared} == lost
        assert await pinned(http, "three") == [1]
        # Versions that were unpinned or deleted in the meantime are not pinned again.
        await http.post("/v1/prompts/three/warm", json={"pin": False})
        await http.delete("/v1/prompts/two")
        engine.prepared.clear()
        engine.on_restarted()
        engine.on_restarted()  # it died again at once
        await until(lambda: is_ready(http))
        assert len(engine.prepared) == 1
        assert await pinned(http, "three") == []
    assert len(store.leased) == len(store.released)


async def test_a_pin_that_cannot_be_restored_is_a_warning(
    make_app: MakeApp,
    settings: Settings,
    client: httpx.AsyncClient,
    engine: FakeEngine,
    sentiment: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await client.post(URL, json={"pin": True, "version": 1})
    engine.prepare_failure = EngineDeadError("it died again")
    engine.on_restarted()
    await until(lambda: "cannot be warmed: it died again" in caplog.text)
    await until(lambda: is_ready(client))
    assert await pinned(client) == [1]
