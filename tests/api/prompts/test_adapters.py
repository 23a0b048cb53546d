"""Adapters in the registry: published, listed, inspected, warmed, pinned, and kept for what was trained over them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from server.api.soft_prompts.pin_budget import LEAST_BYTES, pinned_bytes
from server.engine.types import AdapterSource, Capability
from server.errors import NotFiniteError, RequestRefusedError
from tests.support.api_fixtures import CountingStore, UploadParts, WaitUntil
from tests.support.fake_engine import MODULES, WIDTH, FakeEngine

pytestmark = pytest.mark.anyio

NUM_PARAMETERS = len(MODULES) * 2 * 2 * WIDTH


async def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_a_version_of_an_adapter_says_what_it_changes(
    client: httpx.AsyncClient, engine: FakeEngine, adapter_parts: UploadParts
) -> None:
    response = await client.post("/v1/prompts", **adapter_parts("triage"))
    assert response.status_code == 201, response.text
    version = response.json()
    assert (version["kind"], version["peft_type"], version["task_type"]) == ("adapter", "LORA", "CAUSAL_LM")
    assert (version["rank"], version["num_modules"], version["num_parameters"]) == (2, 4, NUM_PARAMETERS)
    assert (version["targets"], version["over"]) == (["q_proj", "v_proj"], None)
    assert (version["num_virtual_tokens"], version["num_tasks"], version["num_labels"]) == (0, None, None)
    assert (version.pop("changed"), version.pop("warnings")) == ([], [])
    assert version == (await client.get("/v1/prompts/triage/versions/1")).json()
    assert version == (await client.get("/v1/prompts/triage")).json()["latest"]
    assert [source.digest for source in engine.probed_adapters] == [version["digest"]]
    again = await client.post("/v1/prompts", **adapter_parts("triage"))
    assert (again.status_code, again.json()["version"]) == (200, 1)


async def test_a_soft_prompt_has_no_sizes_of_an_adapter(client: httpx.AsyncClient, sentiment: str) -> None:
    version = (await client.get("/v1/prompts/sentiment/versions/1")).json()
    assert (version["kind"], version["targets"]) == ("soft_prompt", [])
    assert [version[key] for key in ("rank", "num_modules", "num_parameters", "over")] == [None] * 4


async def test_names_are_listed_by_kind(client: httpx.AsyncClient, pair: None, adapter_parts: UploadParts) -> None:
    (await client.post("/v1/prompts", **adapter_parts("tone"))).raise_for_status()  # now it has versions of both

    async def names(**query: str) -> list[str]:
        page = (await client.get("/v1/prompts", params=query)).raise_for_status().json()
        return [prompt["id"] for prompt in page["data"]]

    assert await names() == ["other", "style", "tone", "triage"]
    assert await names(kind="adapter") == ["style", "tone", "triage"]
    assert await names(kind="soft_prompt") == ["other", "tone"]
    assert await names(kind="adapter", limit="1", after="style") == ["tone"]
    error = await error_of(await client.get("/v1/prompts", params={"kind": "lora"}), 400)
    assert error["param"] == "kind"


async def test_adapters_are_models(client: httpx.AsyncClient, pair: None) -> None:
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert (cards["triage"]["parent"], cards["triage"]["root"]) == ("tiny", "tiny")
    for name in ("triage@1", "tiny:triage", "tone+triage", "triage@latest+tone@1"):
        card = (await client.get(f"/v1/models/{name}")).raise_for_status().json()
        assert (card["id"], card["parent"]) == (name, "tiny")
    assert (await client.get("/v1/models/tone+other")).status_code == 400
    assert (await client.get("/v1/models/tone+nothing")).status_code == 404


async def test_an_adapter_is_inspected_by_its_modules(
    client: httpx.AsyncClient, engine: FakeEngine, pair: None, store: CountingStore, eventually: WaitUntil
) -> None:
    body = (await client.get("/v1/prompts/triage/inspect")).raise_for_status().json()
    assert (body["kind"], body["peft_type"], body["num_virtual_tokens"]) == ("adapter", "LORA", 0)
    assert (body["tokens"], body["vocabulary"], body["layers"]) == (None, None, None)
    assert [module["name"] for module in body["modules"]] == list(MODULES)
    assert body["modules"][0].items() >= {"rank": 2, "scale": 0.5, "frobenius_norm": 1.0, "share": 0.125}.items()
    assert len(engine.inspected_adapters) == 1
    assert (await client.get("/v1/prompts/tone/inspect")).json()["modules"] is None
    error = await error_of(await client.get("/v1/prompts/triage/inspect?task_id=0"), 400)
    assert "the adapter triage@1 is not one" in error["message"]
    eventually(lambda: len(store.leased) == len(store.released))


async def test_an_adapter_is_warmed_and_pinned(client: httpx.AsyncClient, engine: FakeEngine, pair: None) -> None:
    reply = (await client.post("/v1/prompts/triage/warm", json={"pin": True})).raise_for_status().json()
    assert (reply["version"], reply["pinned"], reply["task_ids"]) == (1, True, None)
    assert (engine.prepared, len(engine.prepared_adapters)) == ([], 1)
    assert list(engine.pinned_adapters.values()) == engine.prepared_adapters
    assert (await client.get("/v1/prompts/triage")).json()["pinned"] == [1]
    await client.post("/v1/prompts/triage/warm", json={"pin": False})
    assert engine.pinned_adapters == {}


async def test_pins_of_adapters_come_back_after_a_restart(
    client: httpx.AsyncClient, engine: FakeEngine, pair: None
) -> None:
    await client.post("/v1/prompts/triage/warm", json={"version": 1, "pin": True})
    engine.prepared_adapters.clear()
    engine.on_restarted()
    await asyncio.sleep(0)
    for _ in range(100):
        if engine.prepared_adapters:
            break
        await asyncio.sleep(0.01)
    assert [source.digest for source in engine.prepared_adapters] == list(engine.pinned_adapters)


def test_a_pinned_adapter_counts_by_its_parameters(engine: FakeEngine) -> None:
    engine.alive = True
    source = AdapterSource(digest="a", path="", config_path="", num_parameters=10_000, num_labels=3)
    assert pinned_bytes(source, engine.model) == 4 * 10_000 + 4 * 3 * WIDTH
    small = AdapterSource(digest="a", path="", config_path="", num_parameters=1)
    assert pinned_bytes(small, engine.model) == LEAST_BYTES


@pytest.fixture
async def trained_over(client: httpx.AsyncClient, pair: None, upload_parts: UploadParts) -> dict[str, Any]:
    """The version ``custom@1``, trained over ``triage@1``."""
    response = await client.post("/v1/prompts", **upload_parts("custom", seed=7, over="triage@1"))
    version: dict[str, Any] = response.raise_for_status().json()
    return version


async def test_a_soft_prompt_is_tried_warmed_and_pinned_with_the_adapter_that_it_was_trained_over(
    client: httpx.AsyncClient, engine: FakeEngine, trained_over: dict[str, Any]
) -> None:
    assert (trained_over["over"], trained_over["kind"]) == ("triage@1", "soft_prompt")
    digest = (await client.get("/v1/prompts/triage")).json()["latest"]["digest"]
    assert [engine.probed[-1][0].digest, engine.probed_adapters[-1].digest] == [trained_over["digest"], digest]
    await client.post("/v1/prompts/custom/warm", json={"pin": True})
    assert [source.digest for source in engine.prepared] == [trained_over["digest"]]
    assert [source.digest for source in engine.prepared_adapters] == [digest]
    assert (list(engine.pinned), list(engine.pinned_adapters)) == ([trained_over["digest"]], [digest])
    await client.post("/v1/prompts/custom/warm", json={"pin": False})
    assert (engine.pinned, engine.pinned_adapters) == ({}, {})


async def test_an_adapter_stays_pinned_as_long_as_a_task_over_it(
    client: httpx.AsyncClient, engine: FakeEngine, pair: None, other_parts: UploadParts
) -> None:
    (await client.post("/v1/prompts", **other_parts("many", over="triage@1"))).raise_for_status()
    await client.post("/v1/prompts/many/warm", json={"pin": True})
    for task_id, num_pinned in ((0, 1), (1, 1), (2, 0)):
        await client.post("/v1/prompts/many/warm", json={"pin": False, "task_id": task_id})
        assert len(engine.pinned_adapters) == num_pinned
    assert engine.pinned == {}


async def test_an_adapter_stays_as_long_as_a_soft_prompt_over_it(
    client: httpx.AsyncClient, trained_over: dict[str, Any]
) -> None:
    for url in ("/v1/prompts/triage/versions/1?force=true", "/v1/prompts/triage?force=true"):
        error = await error_of(await client.delete(url), 409)
        assert error["code"] == "in_use"
        assert "triage@1" in error["message"]
    (await client.delete("/v1/prompts/custom")).raise_for_status()
    (await client.delete("/v1/prompts/triage/versions/1?force=true")).raise_for_status()
    assert (await client.post("/v1/prompts/custom/restore")).status_code == 409
    (await client.post("/v1/prompts/triage/restore")).raise_for_status()
    (await client.post("/v1/prompts/custom/restore")).raise_for_status()


@pytest.mark.parametrize(
    ("over", "code", "text"),
    [
        ("nothing@1", "invalid_prompt", "soft prompt 'nothing' does not exist"),
        ("triage@9", "invalid_prompt", "has no version 9"),
        ("tone@1", "invalid_prompt", "tone@1 is a soft prompt, not an adapter"),
        ("triage", "invalid_request", "must name a version"),
        ("triage@canary", "invalid_request", "must name a version"),
        ("Triage@1", "invalid_request", "is not valid"),
    ],
)
async def test_over_names_a_version_of_an_adapter(
    client: httpx.AsyncClient, pair: None, upload_parts: UploadParts, over: str, code: str, text: str
) -> None:
    response = await client.post("/v1/prompts", **upload_parts("custom", seed=7, over=over))
    error = await error_of(response, 400)
    assert (error["code"], text in error["message"]) == (code, True), error
    if code == "invalid_prompt":
        assert [fault["code"] for fault in error["details"]] == ["unknown_adapter"]
        assert error["details"][0]["field"] == "over"
    else:
        assert error["param"] == "over"


async def test_an_adapter_is_not_trained_over_another(
    client: httpx.AsyncClient, pair: None, adapter_parts: UploadParts
) -> None:
    response = await client.post("/v1/prompts", **adapter_parts("more", seed=9, over="triage@1"))
    error = await error_of(response, 400)
    assert (error["param"], "these files are an adapter" in error["message"]) == ("over", True)


async def test_an_adapter_that_spoils_the_model_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, adapter_parts: UploadParts
) -> None:
    engine.probe_failures[None] = NotFiniteError("a logit is infinite")
    error = await error_of(await client.post("/v1/prompts", **adapter_parts("triage")), 400)
    assert error["details"][0]["code"] == "not_finite_in_model"
    assert "cannot compute with this adapter" in error["message"]


async def test_an_adapter_that_the_engine_never_has_room_for_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, adapter_parts: UploadParts
) -> None:
    """Its numbers fit, but not the engine's layout of them."""
    engine.probe_failures[None] = RequestRefusedError("its 9000 bytes are more than the 8000 for adapters")
    error = await error_of(await client.post("/v1/prompts", **adapter_parts("triage")), 400)
    assert error["details"][0]["code"] == "adapter_too_large"
    assert "its 9000 bytes are more" in error["message"]


async def test_an_engine_without_adapters_takes_none(
    client: httpx.AsyncClient, engine: FakeEngine, pair: None, adapter_parts: UploadParts
) -> None:
    engine.capabilities = tuple(one for one in Capability if one is not Capability.ADAPTERS)
    assert (await client.post("/v1/prompts", **adapter_parts("more", seed=9))).status_code == 400
    error = await error_of(await client.post("/v1/completions", json={"model": "triage", "prompt": "x"}), 400)
    assert error["code"] == "unsupported_by_engine"
    assert (await client.post("/v1/completions", json={"model": "tone", "prompt": "x"})).status_code == 200
