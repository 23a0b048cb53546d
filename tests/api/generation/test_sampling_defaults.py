"""The checkpoint's sampling defaults, in requests with and without these fields."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from server.engine.generation_defaults import GenerationDefaults
from tests.support.fake_engine import CONTEXT, FakeEngine

pytestmark = pytest.mark.anyio

DEFAULTS = GenerationDefaults(
    temperature=0.7,
    top_p=0.8,
    top_k=20,
    min_p=0.05,
    repetition_penalty=1.05,
    min_tokens=3,
    max_tokens=9,
    stop=("wor",),
)


@pytest.fixture(autouse=True)
def _checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    bare: Any = FakeEngine.model
    model = property(lambda self: msgspec.structs.replace(bare.fget(self), generation_defaults=DEFAULTS))
    monkeypatch.setattr(FakeEngine, "model", model)


async def send(client: httpx.AsyncClient, path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "abc"}
    response = await client.post(path, json=prompt | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


PATHS = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens")


@PATHS
@pytest.mark.parametrize("is_null", [False, True])
async def test_unset_fields_have_the_checkpoints_values(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, is_null: bool
) -> None:
    await send(client, path, **(dict.fromkeys([*FIELDS, "stop", "max_tokens"]) if is_null else {}))
    params = engine.requests[0].params
    assert {name: getattr(params, name) for name in FIELDS} == {name: getattr(DEFAULTS, name) for name in FIELDS}
    assert params.max_tokens == 9


@PATHS
async def test_a_request_overrides_each_default(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    own = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    await send(client, path, **own, max_tokens=12)
    params = engine.requests[0].params
    assert {name: getattr(params, name) for name in FIELDS} == own | {"top_k": 0}
    assert params.max_tokens == 12


async def test_stop_strings_of_the_checkpoint_apply(client: httpx.AsyncClient) -> None:
    assert (await send(client, "/v1/completions"))["choices"][0]["text"] == "hello "
    assert (await send(client, "/v1/completions", stop=["l"]))["choices"][0]["text"] == "he"
    assert (await send(client, "/v1/completions", stop=[]))["choices"][0]["text"] == "hello wor"


async def test_the_checkpoints_min_tokens_is_capped_by_max_tokens(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await send(client, "/v1/completions", max_tokens=2)
    assert engine.requests[0].params.min_tokens == 2
    response = await client.post("/v1/completions", json={"prompt": "a", "min_tokens": 3, "max_tokens": 2})
    assert response.json()["error"]["param"] == "min_tokens"


async def test_the_checkpoints_max_tokens_limits_only_the_default(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare: Any = FakeEngine.model
    more = GenerationDefaults(max_tokens=100)
    model = property(lambda self: msgspec.structs.replace(bare.fget(self), generation_defaults=more))
    monkeypatch.setattr(FakeEngine, "model", model)
    await send(client, "/v1/completions")
    await send(client, "/v1/chat/completions")
    await send(client, "/v1/chat/completions", max_tokens=120)
    await send(client, "/v1/completions", prompt="x" * (CONTEXT - 3))
    assert [request.params.max_tokens for request in engine.requests] == [16, 100, 120, 2]


async def test_the_models_route_returns_the_defaults(
    client: httpx.AsyncClient, sentiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = {name: getattr(DEFAULTS, name) for name in FIELDS} | {"stop": ["wor"], "max_tokens": 9}
    for card in (await client.get("/v1/models")).json()["data"]:
        assert card["default_sampling_params"] == want
    monkeypatch.undo()
    assert (await client.get("/v1/models/tiny")).json()["default_sampling_params"] == {}


async def test_the_defaults_apply_to_members_of_a_vote(
    client: httpx.AsyncClient, engine: FakeEngine, sentiment: str
) -> None:
    await send(client, "/v1/completions", model=["tiny", sentiment])
    assert [request.params.temperature for request in engine.requests] == [0.7, 0.7]
