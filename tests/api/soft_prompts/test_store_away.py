"""Answers while the store is unavailable: 503, and the same for another tenant's name as for an unknown one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.watch import CatalogStatus
from prompt_store.errors import StoreUnavailableError
from server.api.keys.callers import Scope
from server.config import Settings
from tests.support.api_fixtures import CountingStore, UploadParts
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry
from tests.support.operations import OPERATIONS

pytestmark = pytest.mark.anyio

KEYS = "".join(
    [
        key_entry("a"),
        key_entry("b", requests_per_minute=10000),
    ]
)

VALUES = {"{version}": "1", "{filename}": "adapter_config.json", "{alias}": "latest"}

NAMING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/completions", {"prompt": "x", "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/classify", {"input": "x", "labels": ["a", "b"]}),
    ("/tokenize", {"prompt": "x"}),
    ("/detokenize", {"tokens": [1]}),
]

REQUESTS = [
    *(
        (
            method,
            path.replace("{model_id:path}", "{id}") + ("?to=1" if path.endswith("/diff") else ""),
            {"PUT": {"version": 1}, "POST": {"keep": 1, "older_than": 0}, "PATCH": {}}.get(method),
        )
        for (method, path), operation in OPERATIONS.by_route.items()
        if ("{id}" in path or "{model_id" in path) and operation.scopes != {Scope.ADMIN}
    ),
    *(
        ("POST", path, body | naming)
        for path, body in NAMING
        for naming in ({"model": "{id}"}, {"prompt_id": "{id}"})
    ),
    *(("POST", path, body | {"model": "{id}@1"}) for path, body in NAMING),
    ("POST", "/v1/completions", {"prompt": "x", "model": ["{id}", "tiny"]}),
    ("POST", "/v1/classify", {"input": "x", "labels": ["a"], "prompt_ids": ["{id}", "{id}@1"]}),
]


async def upload(client: httpx.AsyncClient, upload_parts: UploadParts, name: str, key: str) -> None:
    response = await client.post("/v1/prompts", headers=bearer(key), **upload_parts(name))
    assert response.status_code == 201


def filled(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, name) for item in value]
    return value.replace("{id}", name) if isinstance(value, str) else value


async def answer(
    client: httpx.AsyncClient, method: str, path: str, body: Any, name: str
) -> tuple[int, str, dict[str, str]]:
    for part, value in VALUES.items():
        path = path.replace(part, value)
    response = await client.request(method, path.replace("{id}", name), json=filled(body, name), headers=bearer("b"))
    headers = {
        key: value for key, value in response.headers.items() if key not in ("x-request-id", "content-length", "date")
    }
    counted = ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests", "retry-after-ms")
    return (
        response.status_code,
        response.text.replace(name, "NAME"),
        {key: "" if key in counted else value for key, value in headers.items()},
    )


@pytest.fixture(params=["there", "breaks off", "known to be away", "too slow"])
def catalog(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, store: CountingStore
) -> Callable[[], int]:
    """Puts the catalog into a state; returns the status of requests for missing names."""

    def fail(*_: object, **__: object) -> None:
        raise StoreUnavailableError("the catalog broke off")

    def hang(*_: object, **__: object) -> None:
        raise StoreUnavailableError("canceling statement due to statement timeout")

    def put() -> int:
        if request.param == "there":
            return 404
        if request.param == "known to be away":
            status = CatalogStatus(False, "the catalog takes connections and does not answer", 0.0, 1)
            monkeypatch.setattr(CachedCatalog, "status", property(lambda _: status))
            return 503
        for name in vars(Catalog):
            if not name.startswith("_") and name not in ("is_shared", "close"):
                monkeypatch.setattr(Catalog, name, fail if request.param == "breaks off" else hang)
        return 503

    return put


@pytest.mark.parametrize("is_known", [False, True], ids=["cold", "in the cache"])
async def test_an_unreachable_catalog_does_not_reveal_that_a_name_exists(
    client: httpx.AsyncClient,
    upload_parts: UploadParts,
    catalog: Callable[[], int],
    engine: FakeEngine,
    is_known: bool,
) -> None:
    """Checked on every route with a name, in every state of the catalog and of the cache."""
    await upload(client, upload_parts, "mine", "a")
    if is_known:
        for model in ("mine", "mine@1"):
            done = await client.post("/v1/completions", json={"model": model, "prompt": "x"}, headers=bearer("a"))
            assert done.status_code == 200
    asked = len(engine.requests)
    status = catalog()
    assert len(REQUESTS) > 25
    for method, path, body in REQUESTS:
        own, other = [await answer(client, method, path, body, name) for name in ("mine", "ghost")]
        assert own == other, (method, path, body)
        assert own[0] == status, (method, path, body, own)
    assert len(engine.requests) == asked
    if is_known:  # the cached name still serves its owner
        done = await client.post("/v1/completions", json={"model": "mine", "prompt": "x"}, headers=bearer("a"))
        assert done.status_code == 200


async def test_requests_of_others_do_not_evict_a_cached_name(
    client: httpx.AsyncClient, upload_parts: UploadParts, store: CountingStore
) -> None:
    await upload(client, upload_parts, "mine", "a")
    await client.post("/v1/completions", json={"model": "mine", "prompt": "x"}, headers=bearer("a"))
    for method, path, body in REQUESTS:
        await answer(client, method, path, body, "mine")
    assert len(store._store._cached._resolved._names) == 1


async def test_a_missing_directory_is_503_until_it_returns(
    client: httpx.AsyncClient, upload_parts: UploadParts, settings: Settings
) -> None:
    await upload(client, upload_parts, "mine", "b")
    root = settings.store.location
    asked: list[tuple[str, str, Any]] = [
        ("POST", "/v1/completions", {"model": "{id}", "prompt": "x"}),
        ("POST", "/v1/prompts/{id}/warm", {}),
    ]
    asked += [
        ("GET", f"/v1/prompts/{{id}}/versions/1/files/adapter_{file}", None)
        for file in ("config.json", "model.safetensors")
    ]
    asked += [("GET", "/v1/prompts/{id}/inspect", None)]
    shutil.move(root, f"{root}.away")
    for method, path, body in asked:
        status, text, headers = await answer(client, method, path, body, "mine")
        assert (status, headers["retry-after"]) == (503, "2"), (path, text)
        assert '"store_unavailable"' in text
        assert "again" in text
    refused = await client.post("/v1/prompts", headers=bearer("b"), **upload_parts("other"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    shutil.move(f"{root}.away", root)
    for method, path, body in asked:
        assert (await answer(client, method, path, body, "mine"))[0] == 200, path
    await upload(client, upload_parts, "other", "b")
