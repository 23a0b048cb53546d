"""``/v1/models`` lists every name that a request may use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.config import Settings
from tests.support.api_fixtures import UploadParts
from tests.support.in_process import ready

pytestmark = pytest.mark.anyio


async def test_base_and_soft_prompts_are_listed(client: httpx.AsyncClient, sentiment: str) -> None:
    base, prompt = (await client.get("/v1/models")).json()["data"]
    common = {"object": "model", "owned_by": "prelude", "root": "tiny", "max_model_len": 256}
    common |= {"max_num_seqs": 4, "max_waiting": 4}
    assert base.items() >= (common | {"id": "tiny", "parent": None}).items()
    assert prompt.items() >= (common | {"id": "sentiment", "parent": "tiny"}).items()


@pytest.mark.parametrize("base", ["tiny", "org/model"])
@pytest.mark.parametrize("name", ["sentiment", "sentiment@1", "sentiment@canary", "{base}:sentiment", "{base}"])
@pytest.mark.parametrize("is_encoded", [False, True])
async def test_every_name_is_found(
    make_app: Callable[[Settings], Any],
    settings: Settings,
    upload_parts: Callable[..., dict[str, Any]],
    base: str,
    name: str,
    is_encoded: bool,
) -> None:
    app = make_app(replace(settings, served_model_name=base))
    parts = upload_parts("sentiment", alias="canary")
    model_id = name.format(base=base)
    path = "".join(f"%{byte:02X}" for byte in model_id.encode()) if is_encoded else model_id
    async with ready(app) as client:
        config = parts["files"][0][1][1].replace(b'"tiny"', f'"{base}"'.encode())
        parts["files"][0] = ("files", ("adapter_config.json", config))
        assert (await client.post("/v1/prompts", **parts)).status_code == 201
        response = await client.put("/v1/prompts/sentiment/aliases/latest", json={"version": 1})
        assert response.status_code == 200
        card = (await client.get(f"/v1/models/{path}")).json()
    assert (card["id"], card["root"]) == (model_id, base)
    assert card["parent"] == (None if model_id == base else base)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nothing", "model_not_found"),
        ("nothing@1", "prompt_not_found"),
        ("sentiment@2", "prompt_not_found"),
        ("sentiment@no-such", "prompt_not_found"),
        ("tiny:nothing", "prompt_not_found"),
        ("other:sentiment", "model_not_found"),
        ("org/model", "model_not_found"),
        ("sentiment@0", "model_not_found"),
        ("%00", "model_not_found"),
        ("%ff", "model_not_found"),
    ],
)
async def test_missing_models_are_404(client: httpx.AsyncClient, sentiment: str, name: str, code: str) -> None:
    response = await client.get(f"/v1/models/{name}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, code)


@pytest.mark.parametrize("model", ["sentiment", "tiny:sentiment"])
async def test_a_name_without_latest_says_which_aliases_it_has(
    client: httpx.AsyncClient, upload_parts: UploadParts, model: str
) -> None:
    (await client.post("/v1/prompts", **upload_parts("sentiment", alias="canary"))).raise_for_status()
    asked = await client.post("/v1/completions", json={"model": model, "prompt": "x"})
    for response in (asked, await client.get(f"/v1/models/{model}")):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "prompt_not_found", "model")
        assert error["message"] == "soft prompt 'sentiment' has no alias 'latest': its aliases are canary=1"
    listed = (await client.get("/v1/prompts/sentiment")).json()
    assert (listed["aliases"], listed["latest"]["version"]) == ({"canary": 1}, 1)
