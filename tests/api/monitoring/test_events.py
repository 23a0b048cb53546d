"""``/v1/events``: what a subscriber gets, and when its stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from server.api.batches.runner import BatchRunner
from server.api.keys.callers import Caller, Scope
from server.api.monitoring.events import Subscriber
from server.api.monitoring.routes import picture_of
from server.api.monitoring.subscription import MAX_SUBSCRIBERS
from server.api.services import Services
from server.api.soft_prompts.catalog_changes import CatalogChanges
from server.app import lifecycle_of
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry
from tests.support.live_server import LiveServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio

KEYS = "".join(
    [
        key_entry("a1", tenant="a"),
        key_entry("b1", tenant="b"),
        key_entry("generate", tenant="a", scopes=["generate"]),
    ]
)


class Client:
    """Reads the events of one subscriber."""

    def __init__(self, app: FastAPI, tenant: str, topics: set[str]) -> None:
        services, batches = app.state.services, app.state.batches
        assert isinstance(services, Services)
        assert isinstance(batches, BatchRunner)
        self.is_current = True
        caller = Caller("key", tenant, frozenset(Scope))
        self.subscriber = Subscriber(
            services, caller, topics, lambda: picture_of(services), lambda: self.is_current, batches
        )
        self._events = self.subscriber.events()

    async def read(self) -> tuple[str, dict[str, Any]]:
        frame = await asyncio.wait_for(anext(self._events), 10)
        name, data = frame.decode().removesuffix("\n\n").split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def until_ended(self) -> None:
        async for _ in self._events:
            pass

    async def close(self) -> None:
        await self._events.aclose()


@asynccontextmanager
async def subscribed(app: FastAPI, tenant: str, *topics: str) -> AsyncIterator[Client]:
    client = Client(app, tenant, set(topics))
    try:
        yield client
    finally:
        await client.close()


async def test_a_subscriber_gets_the_state_and_then_what_changes(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    async with subscribed(app, "a", "live") as one:
        assert (await one.read())[1]["phase"] == "serving"
        name, pool = await one.read()
        assert (name, pool["total"]) == ("pool", 10)
        name, live = await one.read()
        assert (name, live["step"], live["blocks"]["map"]) == ("live", 0, None)
        reading = asyncio.create_task(one.read())
        await asyncio.sleep(0.5)
        assert not reading.done(), "nothing has changed"
        engine.picture = msgspec.structs.replace(engine.picture, step=9)
        name, live = await reading
        assert (name, live["step"]) == ("live", 9)
        engine.outage = "killed"
        name, state = await one.read()
        assert (name, state["phase"], state["reason"]) == ("server", "restarting", "engine restarting: killed")


async def test_changes_of_the_catalog_are_seen_by_those_who_see_the_soft_prompt(
    client: httpx.AsyncClient, app: FastAPI, upload_parts: UploadParts
) -> None:
    async with subscribed(app, "a", "catalog") as one, subscribed(app, "b", "catalog") as other:
        for each in (one, other):
            assert (await each.read())[0] == "server"
        unseen = asyncio.create_task(other.read())
        response = await client.post("/v1/prompts", headers=bearer("a1"), **upload_parts("mine"))
        assert response.status_code == 201
        name, changed = await one.read()
        assert (name, changed["id"], changed["version"]) == ("catalog", "mine", 1)
        await asyncio.sleep(0.5)
        assert not unseen.done(), "another tenant's change was shown"
        unseen.cancel()
        await asyncio.gather(unseen, return_exceptions=True)


async def test_the_newest_point_of_the_load_is_sent(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    load = app.state.services.load
    async with subscribed(app, "a", "stats") as one:
        assert (await one.read())[0] == "server"
        load.sample(engine.stats, load.began + 10)
        name, point = await one.read()
        assert (name, point["blocks"]) == ("stats", 10)


async def test_a_stream_ends_with_its_key_and_with_the_server(client: httpx.AsyncClient, app: FastAPI) -> None:
    services = app.state.services
    for _ in range(2):
        async with subscribed(app, "a", "live") as one:
            await one.read()
            assert services.num_subscribers == 1
            one.is_current = False
            await asyncio.wait_for(one.until_ended(), 10)
        assert services.num_subscribers == 0
    async with subscribed(app, "a", "live") as one:
        await one.read()
        lifecycle_of(app).drain()
        await asyncio.wait_for(one.until_ended(), 10)
    assert services.num_subscribers == 0


async def test_topics_need_their_scope(client: httpx.AsyncClient, app: FastAPI) -> None:
    for topics, key, status in (
        ("live,nothing", "a1", 400),
        ("", "a1", 400),
        ("catalog", "generate", 403),
        ("live,stats,catalog", "generate", 403),
    ):
        response = await client.get(f"/v1/events?topics={topics}", headers=bearer(key))
        assert response.status_code == status, topics
    app.state.services.num_subscribers = MAX_SUBSCRIBERS
    response = await client.get("/v1/events", headers=bearer("a1"))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")


def test_a_closed_tab_leaves_no_subscriber(live: LiveServer, app: FastAPI) -> None:
    services = live.server.config.app.state.services  # type: ignore[union-attr]
    with httpx.Client() as client, client.stream("GET", f"{live.url}/v1/events?topics=live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = response.iter_text()
        assert next(pieces).startswith("event: server\ndata: {")
        assert services.num_subscribers == 1
    wait_until(lambda: services.num_subscribers == 0)


def test_changes_are_bounded() -> None:
    changes = CatalogChanges()
    start = changes.position
    assert changes.since(start) == set()
    changes.note({"a"})
    changes.note({"b"})
    assert changes.since(start) == {"a", "b"}
    assert changes.since(start + 1) == {"b"}
    changes.note(None)
    assert changes.since(start) is None
    assert changes.since(changes.position) == set()
    for _ in range(2000):
        changes.note({"c"})
    assert changes.since(start) is None


async def test_evaluations_and_runs_are_jobs_of_their_tenant(client: httpx.AsyncClient, app: FastAPI) -> None:
    run = {"prompt_id": "tone", "method": "lora", "status": "running", "started_at": 1}
    row = {"line": 1, "expected": "x", "answer": "x"}
    evaluation = {"model": "tiny", "rows": [row], "metric": "accuracy", "dataset_digest": "0" * 64}
    async with subscribed(app, "a", "jobs") as one, subscribed(app, "b", "jobs") as other:
        for each in (one, other):
            assert (await each.read())[0] == "server"
        unseen = asyncio.create_task(other.read())
        headers = bearer("a1")
        (await client.post("/v1/evaluations", json=evaluation, headers=headers)).raise_for_status()
        (await client.put("/v1/runs/run-" + "0" * 32, json=run, headers=headers)).raise_for_status()
        found = [await one.read(), await one.read()]
        assert [name for name, _ in found] == ["job", "job"]
        assert {job["object"] for _, job in found} == {"evaluation", "run"}
        await asyncio.sleep(0.5)
        assert not unseen.done(), "another tenant's jobs were shown"
        unseen.cancel()
        await asyncio.gather(unseen, return_exceptions=True)
