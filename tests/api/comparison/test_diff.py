"""``GET /v1/prompts/{id}/diff``: fields, virtual tokens, use, errors and tenants."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.api.comparison.routes import changes
from tests.support.api_fixtures import UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def two(client: httpx.AsyncClient, upload_parts: UploadParts) -> httpx.AsyncClient:
    """``p`` with 4 and with 6 virtual tokens; the second is latest."""
    lineage = json.dumps({"scores": {"f1": 0.5}})
    (await client.post("/v1/prompts", **upload_parts("p", lineage=lineage))).raise_for_status()
    lineage = json.dumps({"parent": "p@1", "scores": {"f1": 0.75}})
    more = {"description": "longer", "metadata": json.dumps({"a": {"b": 1}}), "lineage": lineage}
    (await client.post("/v1/prompts", **upload_parts("p", seed=1, rows=6, **more))).raise_for_status()
    return client


async def diff(client: httpx.AsyncClient, **params: Any) -> dict[str, Any]:
    response = await client.get("/v1/prompts/p/diff", params=params)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


async def test_fields_scores_and_virtual_tokens_are_compared(two: httpx.AsyncClient) -> None:
    found = await diff(two, **{"from": 1, "to": "latest"})
    assert (found["before"]["version"], found["after"]["version"], found["same_files"]) == (1, 2, False)
    assert (found["before"]["aliases"], found["after"]["aliases"]) == ([], ["latest"])
    assert (found["before"]["scores"], found["after"]["scores"]) == ({"f1": 0.5}, {"f1": 0.75})
    assert found["configuration"] == [{"field": "num_virtual_tokens", "before": 4, "after": 6}]
    assert found["metadata"] == [
        {"field": "description", "before": "", "after": "longer"},
        {"field": "metadata.a", "before": None, "after": {"b": 1}},
    ]
    assert found["lineage"] == [
        {"field": "parent", "before": None, "after": "p@1"},
        {"field": "scores.f1", "before": 0.5, "after": 0.75},
    ]
    assert [token["index"] for token in found["tokens"]] == [0, 1, 2, 3]
    assert all(-1 <= token["cosine"] < 0.99 and token["layers"] is None for token in found["tokens"])
    same = await diff(two, to=2)  # from latest
    assert same["same_files"]
    assert [token["cosine"] for token in same["tokens"]] == pytest.approx([1.0] * 6)
    assert same["configuration"] == same["metadata"] == same["lineage"] == []
    assert (await diff(two, to=2, max_tokens=5))["tokens"] is None


async def test_another_name_is_compared_by_layer(two: httpx.AsyncClient, other_parts: UploadParts) -> None:
    for name in ("q", "r"):
        (await two.post("/v1/prompts", **other_parts(name, peft_type="PREFIX_TUNING"))).raise_for_status()
    assert (await diff(two, against="q@1"))["tokens"] is None  # rows of another kind
    response = await two.get("/v1/prompts/q/diff", params={"against": "r"})
    found = response.json()
    assert (found["before"]["id"], found["after"]["id"]) == ("q", "r")
    layers = found["tokens"][0]["layers"]
    assert len(layers) == 2
    assert layers[0]["keys"]["cosine"] == pytest.approx(1.0)


async def test_use_shows_whom_a_move_would_meet(two: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"model": "p@1", "prompt": "x", "max_tokens": 1}
    (await two.post("/v1/completions", json=body)).raise_for_status()
    engine.stall_after = 0
    running = asyncio.create_task(two.post("/v1/completions", json=body))
    await until(lambda: engine.in_flight == 1)
    found = await diff(two, **{"from": 1, "to": 2})
    assert (found["before"]["running"], found["before"]["requests_last_hour"]) == (1, 1)
    assert (found["after"]["running"], found["after"]["requests_last_hour"]) == (0, 0)
    engine.stall_after = None
    await until(running.done)
    found = await diff(two, **{"from": 1, "to": 2})
    assert (found["before"]["running"], found["before"]["requests_last_hour"]) == (0, 2)


@pytest.mark.parametrize(
    ("params", "status", "param"),
    [
        ({}, 400, "to"),
        ({"to": "1", "against": "p@1"}, 400, "to"),
        ({"to": "No"}, 400, "to"),
        ({"from": "0", "to": "1"}, 400, "from"),
        ({"against": "x@y@z"}, 400, "against"),
        ({"to": "1", "max_tokens": "5000"}, 400, "max_tokens"),
        ({"to": "9"}, 404, None),
        ({"from": "canary", "to": "1"}, 404, None),
        ({"against": "missing@1"}, 404, None),
    ],
)
async def test_what_cannot_be_compared_is_refused(
    two: httpx.AsyncClient, params: dict[str, str], status: int, param: str | None
) -> None:
    response = await two.get("/v1/prompts/p/diff", params=params)
    assert response.status_code == status, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param


def test_nested_fields_have_paths() -> None:
    before, after = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "e": None, "d": [1]}
    assert [(one.field, one.before, one.after) for one in changes(before, after)] == [("a.c", 2, 3)]
