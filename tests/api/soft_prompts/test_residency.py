"""Where versions lie: ``include=residency``."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from server.engine.messages import MAX_HOST_DIGESTS, AdapterPicture, RunPicture
from server.engine.types import Capability
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

NOWHERE = {"known": True, "device": None, "host": False, "disk": True}


def run(digest: str, task_id: int | None = None, state: str = "used", num_users: int = 1) -> RunPicture:
    key = f"{digest}/{task_id}"
    return RunPicture(key=key, digest=digest, task_id=task_id, num_blocks=2, num_users=num_users, state=state)


async def upload(client: httpx.AsyncClient, upload_parts: UploadParts, name: str, seed: int) -> str:
    response = await client.post("/v1/prompts", **upload_parts(name, seed=seed))
    assert response.status_code == 201, response.text
    return str(response.json()["digest"])


async def residency(client: httpx.AsyncClient, path: str = "/v1/prompts/task/versions/1") -> Any:
    response = await client.get(path, params={"include": "residency"})
    assert response.status_code == 200, response.text
    return response.json()["residency"]


async def test_a_version_tells_device_host_and_disk(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    digest = await upload(client, upload_parts, "task", 0)
    assert await residency(client) == NOWHERE
    runs = [run(digest, 0, num_users=3), run(digest, 1, "idle", num_users=0), run("another", num_users=7)]
    engine.picture = msgspec.structs.replace(engine.picture, runs=runs, host=[digest])
    device = {"blocks": 4, "users": 3, "state": "used"}
    assert await residency(client) == {"known": True, "device": device, "host": True, "disk": True}
    for states, together in ((("idle", "idle"), "idle"), (("idle", "loading"), "loading")):
        runs = [run(digest, task, state, num_users=0) for task, state in enumerate(states)]
        engine.picture = msgspec.structs.replace(engine.picture, runs=runs)
        assert (await residency(client))["device"] == {"blocks": 4, "users": 0, "state": together}


@pytest.mark.parametrize(
    ("num_users", "is_loaded", "state"), [(0, True, "idle"), (2, True, "used"), (2, False, "loading")]
)
async def test_an_adapter_takes_no_blocks(
    client: httpx.AsyncClient,
    upload_parts: UploadParts,
    engine: FakeEngine,
    num_users: int,
    is_loaded: bool,
    state: str,
) -> None:
    digest = await upload(client, upload_parts, "task", 0)
    adapter = AdapterPicture(digest=digest, num_users=num_users, is_loaded=is_loaded)
    engine.picture = msgspec.structs.replace(engine.picture, adapters=[adapter])
    assert (await residency(client))["device"] == {"blocks": 0, "users": num_users, "state": state}


async def test_an_engine_that_does_not_say_leaves_memory_unknown(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    await upload(client, upload_parts, "task", 0)
    engine.capabilities = tuple(one for one in Capability if one is not Capability.BATCH_PICTURE)
    assert await residency(client) == {"known": False, "device": None, "host": None, "disk": True}


async def test_a_full_list_of_what_is_in_host_memory_says_nothing_of_the_rest(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    await upload(client, upload_parts, "task", 0)
    host = [f"{index:064x}" for index in range(MAX_HOST_DIGESTS)]
    engine.picture = msgspec.structs.replace(engine.picture, host=host)
    assert (await residency(client))["host"] is None


async def test_lists_tell_it_only_if_asked(
    client: httpx.AsyncClient, upload_parts: UploadParts, engine: FakeEngine
) -> None:
    digests = [await upload(client, upload_parts, "task", seed) for seed in range(2)]
    engine.picture = msgspec.structs.replace(engine.picture, runs=[run(digests[1])])
    plain = (await client.get("/v1/prompts/task/versions")).json()["data"]
    assert [one["residency"] for one in plain] == [None, None]
    asked = (await client.get("/v1/prompts/task/versions?include=residency")).json()["data"]
    assert [one["residency"]["device"] is not None for one in asked] == [True, False]
    (listed,) = (await client.get("/v1/prompts?include=usage&include=residency")).json()["data"]
    assert listed["latest"]["residency"]["device"]["blocks"] == 2
    assert listed["usage"]["requests"] == 0
    assert (await client.get("/v1/prompts/task/versions?include=texts")).status_code == 400


async def test_a_page_without_names_asks_no_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.capabilities = ()
    assert (await client.get("/v1/prompts?include=residency")).json()["data"] == []
