from __future__ import annotations

import httpx
import pytest

from server.errors import EngineDeadError, OverloadedError, RequestFailedError
from tests.support.api_fixtures import CountingStore, UploadParts, WaitUntil
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

URL = "/v1/prompts/sentiment/inspect"


async def test_embeddings_are_described_by_near_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str, store: CountingStore, eventually: WaitUntil
) -> None:
    body = (await client.get(URL)).json()
    assert (body["object"], body["id"], body["version"]) == ("prompt.inspection", "sentiment", 1)
    assert (body["peft_type"], body["num_virtual_tokens"], body["task_id"]) == ("PROMPT_TUNING", 4, None)
    assert body["vocabulary"] == {"norm_mean": 1.5, "norm_std": 0.25}
    assert body["layers"] is None
    assert [token["index"] for token in body["tokens"]] == [0, 1, 2, 3]
    assert body["tokens"][2]["norm"] == 2.0
    assert [near["text"] for near in body["tokens"][0]["nearest"]] == list("abcde")
    assert body["tokens"][0]["nearest"][1] == {"token_id": 98, "text": "b", "similarity": 0.99}
    eventually(lambda: len(store.leased) == len(store.released) == 1)
    assert engine.requests == []


async def test_top_k_sets_the_number_of_near_tokens(client: httpx.AsyncClient, sentiment: str) -> None:
    body = (await client.get(URL, params={"top_k": 20})).json()
    assert len(body["tokens"][0]["nearest"]) == 20


async def test_key_value_prefixes_are_described_by_layer(client: httpx.AsyncClient, other_parts: UploadParts) -> None:
    (await client.post("/v1/prompts", **other_parts("prefix", peft_type="PREFIX_TUNING"))).raise_for_status()
    body = (await client.get("/v1/prompts/prefix/inspect")).json()
    assert (body["tokens"], body["vocabulary"]) == (None, None)
    assert body["layers"][1] == {
        "index": 1,
        "keys": {"mean": 2.0, "min": 1.0, "max": 3.0},
        "values": {"mean": 5.0, "min": 4.0, "max": 6.0},
    }


async def test_versions_and_aliases_can_be_inspected(
    client: httpx.AsyncClient, upload_parts: UploadParts, sentiment: str
) -> None:
    (await client.post("/v1/prompts", **upload_parts("sentiment", seed=1, alias="canary"))).raise_for_status()
    for query, version in (({}, 1), ({"version": 2}, 2), ({"alias": "canary"}, 2), ({"alias": "latest"}, 1)):
        assert (await client.get(URL, params=query)).json()["version"] == version


async def test_one_task_can_be_inspected(
    client: httpx.AsyncClient, engine: FakeEngine, other_parts: UploadParts
) -> None:
    (await client.post("/v1/prompts", **other_parts("many"))).raise_for_status()
    body = (await client.get("/v1/prompts/many/inspect?task_id=2")).json()
    assert body["task_id"] == 2
    assert engine.inspected[0].task_id == 2
    for query, message in (("", "a task is required"), ("?task_id=3", "task 3 does not exist")):
        response = await client.get(f"/v1/prompts/many/inspect{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "task_id")
        assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("top_k=0", "top_k"),
        ("top_k=21", "top_k"),
        ("version=0", "version"),
        ("alias=Bad", "alias"),
        ("alias=7", "alias"),
        ("task_id=-1", "task_id"),
        ("task_id=0", "task_id"),
        ("version=1&alias=latest", "version"),
    ],
)
async def test_bad_queries_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str, query: str, param: str
) -> None:
    response = await client.get(f"{URL}?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.inspected == []


@pytest.mark.parametrize("path", ["no-such/inspect", "sentiment/inspect?version=9", "sentiment/inspect?alias=none"])
async def test_missing_soft_prompts_are_404(client: httpx.AsyncClient, sentiment: str, path: str) -> None:
    response = await client.get(f"/v1/prompts/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "prompt_not_found")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (RequestFailedError("soft prompt x cannot be read"), 500, "request_failed"),
        (OverloadedError("16 inspections wait already"), 429, "overloaded"),
        (EngineDeadError("the engine process ended"), 503, "engine_dead"),
    ],
)
async def test_an_engine_failure_is_an_error(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    sentiment: str,
    store: CountingStore,
    eventually: WaitUntil,
    failure: Exception,
    status: int,
    code: str,
) -> None:
    engine.inspect_failure = failure
    response = await client.get(URL)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    eventually(lambda: len(store.leased) == len(store.released) == 1)


async def test_a_draining_server_refuses_inspection(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str
) -> None:
    engine.draining = True
    assert (await client.get(URL)).status_code == 503
