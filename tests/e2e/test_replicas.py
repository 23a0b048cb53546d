"""Two servers on one PostgreSQL catalog and one object store, tested over HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.prompt_store.databases import postgres_url, refuse_connections
from tests.prompt_store.s3_server import BUCKET, Server, s3_server
from tests.support.serving import adapter, serving, upload
from tests.support.waiting import seconds_until, wait_until


@dataclass
class Pair:
    here: httpx.Client
    there: httpx.Client
    catalog: str
    s3: Server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        url = stack.enter_context(postgres_url())
        s3 = stack.enter_context(s3_server())
        here, there = (
            stack.enter_context(
                serving(
                    Path(folder / name),
                    *("--catalog", url, "--cache", str(folder / f"{name}-cache")),
                    store=f"s3://{BUCKET}/replicas",
                    environment={**os.environ, **s3.environment},
                )
            )[0]
            for name in ("here", "there")
        )
        yield Pair(here, there, url, s3)


def answer(client: httpx.Client, model: str, text: str = "Will it rain in Oslo on Monday?") -> tuple[int, str]:
    body = {"model": model, "prompt": text, "temperature": 0, "max_tokens": 8}
    response = client.post("/v1/completions", json=body)
    reply = response.json()
    return response.status_code, reply["choices"][0]["text"].strip() if "choices" in reply else reply["error"]["code"]


def within_a_second(look: Callable[[], object], wanted: object) -> None:
    assert seconds_until(lambda: look() == wanted, 1.0) < 1.0, look()


def test_uploads_and_promotions_reach_the_other_server_within_a_second(pair: Pair) -> None:
    assert answer(pair.there, "task") == (404, "model_not_found")
    assert upload(pair.here, "task", *adapter("intent")).status_code == 201
    within_a_second(lambda: answer(pair.there, "task"), (200, "weather"))
    assert upload(pair.there, "task", *adapter("sentiment")).json()["version"] == 2
    within_a_second(lambda: answer(pair.here, "task")[1] in {"positive", "negative"}, True)
    reply = pair.here.post("/v1/prompts/task/aliases/latest/rollback", json={"expected_version": 2})
    assert (reply.status_code, reply.json()["version"]) == (200, 1)
    assert answer(pair.here, "task") == (200, "weather")
    within_a_second(lambda: answer(pair.there, "task"), (200, "weather"))
    pair.there.delete("/v1/prompts/task?force=true")
    within_a_second(lambda: answer(pair.here, "task"), (404, "model_not_found"))


def test_files_can_be_downloaded_from_the_other_server(pair: Pair) -> None:
    config, weights = adapter("extract")
    upload(pair.here, "files", config, weights)
    for name, data in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
        response = pair.there.get(f"/v1/prompts/files/versions/1/files/{name}")
        assert (response.status_code, response.content) == (200, data)


def test_a_pin_follows_promotions_on_the_other_server(pair: Pair) -> None:
    upload(pair.here, "pinned", *adapter("intent"))
    assert pair.there.post("/v1/prompts/pinned/warm", json={"pin": True}).json()["pinned"]
    upload(pair.here, "pinned", *adapter("sentiment"))
    within_a_second(lambda: pair.there.get("/v1/prompts/pinned").json()["pinned"], [2])
    pair.here.delete("/v1/prompts/pinned?force=true")
    within_a_second(lambda: pair.there.get("/v1/prompts/pinned").status_code, 404)


def catalog_available(client: httpx.Client) -> str:
    lines = client.get("/metrics").text.splitlines()
    return next(line.split()[1] for line in lines if line.startswith("prelude_catalog_available "))


def test_cached_soft_prompts_are_served_while_the_catalog_is_unreachable(pair: Pair) -> None:
    upload(pair.here, "held", *adapter("intent"))
    within_a_second(lambda: answer(pair.there, "held"), (200, "weather"))
    time.sleep(0.6)  # after the next poll of the revision
    assert answer(pair.there, "held") == (200, "weather")
    refuse_connections(pair.catalog, refuse=True)
    try:
        wait_until(lambda: catalog_available(pair.there) == "0.0")
        ready = pair.there.get("/ready")
        assert ready.status_code == 200
        assert "unavailable" in ready.json()["store"]
        assert answer(pair.there, "held") == (200, "weather")
        for response in (
            upload(pair.there, "new", *adapter("sentiment")),
            pair.there.put("/v1/prompts/held/aliases/canary", json={"version": 1}),
            pair.there.delete("/v1/prompts/held"),
            pair.there.get("/v1/prompts"),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
            assert response.headers["retry-after"]
    finally:
        refuse_connections(pair.catalog, refuse=False)
    wait_until(lambda: catalog_available(pair.there) == "1.0")
    assert pair.there.get("/ready").json()["store"] == "available"
    assert upload(pair.there, "new", *adapter("sentiment")).status_code == 201


def test_cached_files_are_served_while_the_object_store_is_unreachable(pair: Pair) -> None:
    """This must be the last test: the object store stays stopped."""
    upload(pair.here, "cold", *adapter("dates"))
    assert answer(pair.there, "held") == (200, "weather")
    pair.s3.stop()
    assert answer(pair.there, "held") == (200, "weather")  # from its local copy
    config, weights = adapter("intent")
    response = upload(pair.there, "late", config.rstrip()[:-1] + b', "note": 1}', weights)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
    assert answer(pair.there, "late") == (404, "model_not_found")
    assert answer(pair.there, "cold") == (503, "store_unavailable")
