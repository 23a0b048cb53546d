"""``/v1/engine`` and ``/v1/stats``: what each tenant sees of the batch and the load."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.load import MAX_POINTS, Load, Times, percentiles
from server.api.monitoring.stats_body import stats_body
from server.api.services import Services
from server.engine.messages import BatchPicture, Phase, RunPicture, SequencePicture
from server.engine.stats import EngineStats
from server.engine.types import Capability
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

KEYS = "".join(
    [
        key_entry("a1", tenant="a"),
        key_entry("b1", tenant="b"),
        key_entry("root", tenant="", scopes=["generate", "prompts:read", "prompts:write", "admin"]),
        key_entry("writer", tenant="a", scopes=["prompts:write"]),
    ]
)


def services_of(app: FastAPI) -> Services:
    services = app.state.services
    assert isinstance(services, Services)
    return services


def row(request_id: str, tenant: str, run: str | None, **fields: Any) -> SequencePicture:
    known: dict[str, Any] = {
        "phase": Phase.DECODE,
        "is_batch": False,
        "num_virtual_tokens": 4,
        "num_text_tokens": 2,
        "num_new_tokens": 1,
        "num_computed": 6,
        "num_prompt_blocks": 0,
        "num_shared_blocks": 0,
        "num_own_blocks": 1,
        "age_seconds": 0.5,
        "reason": None,
    }
    return SequencePicture(request_id=request_id, tenant=tenant, run=run, **(known | fields))


def has_requests(engine: FakeEngine, count: int) -> bool:
    return len(engine.requests) == count


async def upload(client: httpx.AsyncClient, upload_parts: UploadParts, name: str, key: str, **fields: Any) -> str:
    response = await client.post("/v1/prompts", headers=bearer(key), **upload_parts(name, **fields))
    assert response.status_code == 201, response.text
    return str(response.json()["digest"])


async def test_a_tenant_sees_its_rows_and_shared_soft_prompts(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    digests = {
        "mine": await upload(client, upload_parts, "mine", "a1"),
        "theirs": await upload(client, upload_parts, "theirs", "b1", seed=1),
        "ours": await upload(client, upload_parts, "ours", "root", seed=2, shared="true"),
    }
    engine.stall_after = 1
    asked = []
    for count, (name, key) in enumerate((("mine", "a1"), ("theirs", "b1"), ("ours", "b1"), ("tiny", "a1")), 1):
        sent = client.post("/v1/completions", json={"model": name, "prompt": "x"}, headers=bearer(key))
        asked.append(asyncio.create_task(sent))
        await until(partial(has_requests, engine, count))
    rows = [
        row(request.request_id, request.salt, None if request.soft_prompt is None else request.soft_prompt.digest)
        for request in engine.requests
    ]
    engine.picture = BatchPicture(
        step=7,
        sequences=[*rows, row("ended", "a", None, phase=Phase.WAITING, reason="blocks")],
        runs=[
            RunPicture(key=digest, digest=digest, task_id=None, num_blocks=1, num_users=1, state="used")
            for digest in digests.values()
        ],
        num_blocks=10,
        num_used_blocks=7,
        num_idle_blocks=1,
        block_map=bytes(range(7)) + bytes(3),
    )
    expected = {
        "a1": (
            ["mine@1", None, None, None, None],
            ["mine@1", None, "ours@1"],
            [True, False, False, True, True],
        ),
        "b1": (
            [None, "theirs@1", "ours@1", None, None],
            [None, "theirs@1", "ours@1"],
            [False, True, True, False, False],
        ),
        "root": ([None] * 5, [None, None, "ours@1"], [False] * 5),
    }
    ids = set()
    for key, (names, resident, mine) in expected.items():
        found = (await client.get("/v1/engine", headers=bearer(key))).json()
        assert [one["name"] for one in found["rows"]] == names
        assert [one["mine"] for one in found["rows"]] == mine
        assert [one["name"] for one in found["soft_prompts"]] == resident
        for one in found["rows"]:
            assert one["mine"] or one["soft_prompt"] is None
            assert one["text_tokens"] == 2
        assert (found["step"], found["shows_rows"], found["blocks"]["used"]) == (7, True, 7)
        assert base64.b64decode(found["blocks"]["map"]) == engine.picture.block_map
        ids.add(tuple(one["id"] for one in found["rows"]))
    assert len(ids) == 1, "a row has the same id for all"
    assert not any(request.request_id in str(ids) for request in engine.requests)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def test_an_engine_that_does_not_know_its_batch_shows_counts(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.capabilities = tuple(one for one in Capability if one is not Capability.BATCH_PICTURE)
    engine.stats.num_running = 3
    found = (await client.get("/v1/engine", headers=bearer("a1"))).json()
    assert (found["shows_rows"], found["rows"], found["running"], found["blocks"]["map"]) == (False, [], 3, None)
    assert found["blocks"]["used"] == 5


async def test_the_routes_need_one_of_their_scopes_and_a_running_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for path in ("/v1/engine", "/v1/stats", "/v1/events"):
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers=bearer("writer"))).status_code == 403
    engine.outage = "killed"
    assert (await client.get("/v1/engine", headers=bearer("a1"))).status_code == 503
    assert (await client.get("/v1/stats", headers=bearer("a1"))).status_code == 200


async def test_the_load_is_told_in_points(client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine) -> None:
    load = services_of(app).load
    load.sample(engine.stats, load.began)
    load.points.clear()
    assert (await client.post("/v1/completions", json={"prompt": "x"}, headers=bearer("a1"))).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": ""}, headers=bearer("a1"))).status_code == 400
    engine.stats.generation_tokens, engine.stats.prompt_tokens = 120, 40
    engine.stats.prefix_cache_queries, engine.stats.prefix_cache_hits = 40, 10
    load.sample(engine.stats, load.began + 10)
    found = (await client.get("/v1/stats", headers=bearer("b1"))).json()
    (point,) = found["points"]
    assert (point["tokens_per_second"], point["prompt_tokens_per_second"], point["cache_hit_rate"]) == (
        12.0,
        4.0,
        0.25,
    )
    assert point["outcomes"] == {"stop": 1}
    assert point["errors"] == {"invalid_request": 1}
    assert point["first_token_seconds"]["p50"] >= 0
    assert point["between_tokens_seconds"]["p95"] >= 0
    assert (found["step"], found["since"]) == (10, int(load.began))


@pytest.mark.parametrize("query", ["window=5", "window=3601", "step=5", "step=15", "step=x"])
async def test_bad_intervals_are_refused(client: httpx.AsyncClient, query: str) -> None:
    response = await client.get(f"/v1/stats?{query}", headers=bearer("a1"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, query.partition("=")[0])


async def test_marks_are_seen_by_their_tenant(
    client: httpx.AsyncClient, app: FastAPI, upload_parts: UploadParts
) -> None:
    await upload(client, upload_parts, "mine", "a1")
    services_of(app).load.mark("restart")
    for key, expected in (("a1", [("publish", "mine@1")]), ("b1", []), ("root", [])):
        marks = (await client.get("/v1/stats", headers=bearer(key))).json()["marks"]
        assert [(mark["kind"], mark["text"]) for mark in marks] == [*expected, ("restart", "")]


def test_points_are_bounded_and_joined() -> None:
    load = Load()
    for number in range(MAX_POINTS + 5):
        stats = EngineStats(generation_tokens=100 * number, num_running=number)
        load.sample(stats, load.began + 10 * (number + 1))
    assert len(load.points) == MAX_POINTS
    now = load.points[-1].at
    body = stats_body(load, "", window=600, step=60, now=now)
    assert 10 <= len(body.points) <= 11
    assert body.points[5].tokens_per_second == 10.0
    assert body.points[-1].running == MAX_POINTS + 4
    assert len(stats_body(load, "", window=600, step=10, now=now).points) == 60


def test_a_restarted_engine_counts_from_zero() -> None:
    load = Load()
    load.sample(EngineStats(generation_tokens=500), load.began + 10)
    assert load.sample(EngineStats(generation_tokens=3), load.began + 20).generation_tokens == 0


def test_percentiles_weigh_samples_by_their_number() -> None:
    assert percentiles([]) is None
    assert percentiles([Times()]) is None
    slow, fast = Times(), Times()
    for _ in range(3000):
        fast.add(1.0)
    for _ in range(100):
        slow.add(2.0)
    assert len(fast.sample) == 256
    assert percentiles([fast, slow]) == (1.0, 1.0)
    assert percentiles([slow, Times()]) == (2.0, 2.0)
    spread = Times()
    for number in range(100):
        spread.add(float(number))
    median, high = percentiles([spread]) or (0.0, 0.0)
    assert (median, high) == (49.0, 94.0)
    assert Counter(spread.sample).total() == 100


async def test_bytes_of_several_names_have_the_one_that_was_used_last(
    client: httpx.AsyncClient, app: FastAPI, upload_parts: UploadParts
) -> None:
    digest = await upload(client, upload_parts, "ours", "root", shared="true")
    assert await upload(client, upload_parts, "mine", "a1") == digest
    names = app.state.services.names
    for name, seen in (("mine", ("mine@1", None)), ("ours", ("ours@1", "ours@1")), ("mine", ("mine@1", "ours@1"))):
        asked = {"model": name, "prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=asked, headers=bearer("a1"))).is_success
        assert (names.name_for("a", digest), names.name_for("b", digest)) == seen
