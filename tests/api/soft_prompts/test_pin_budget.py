"""Budgets of pins, per tenant and in total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from server.api.soft_prompts.pin_budget import LEAST_BYTES, PinBudget, pinned_bytes
from server.app import _pin_budget
from server.config import Settings
from server.engine.types import SoftPromptSource
from server.errors import PinBudgetError
from tests.support.api_fixtures import CountingStore, MakeApp, UploadParts, WaitUntil
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry, locked
from tests.support.waiting import until

Pin = Callable[..., Awaitable[httpx.Response]]
Push = Callable[..., Awaitable[None]]

KEYS = "".join(
    [
        key_entry("a"),
        key_entry("b"),
    ]
)

IDENTITIES = st.sampled_from("pqrs")
TENANTS = st.sampled_from([None, "a", "b"])
SIZES = {"p": 10, "q": 20, "r": 30, "s": 40}


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("pin"), TENANTS, st.sets(IDENTITIES, min_size=1)),
            st.tuples(st.just("end"), st.integers(0, 100), st.none()),
            st.tuples(st.just("move"), st.integers(0, 100), IDENTITIES),
        ),
        max_size=60,
    )
)
def test_the_budget_accepts_exactly_the_pins_that_fit(steps: list[tuple[str, Any, Any]]) -> None:
    """Compared with plain counting of a list of pins."""
    budget = PinBudget(100, 60)
    pins: list[tuple[str | None, str]] = []

    def used(found: list[tuple[str | None, str]]) -> tuple[dict[str | None, int], int]:
        own = {tenant: sum(SIZES[i] for i in {i for t, i in found if t == tenant}) for tenant in (None, "a", "b")}
        return own, sum(SIZES[identity] for identity in {identity for _, identity in found})

    def fits(tenant: str | None, after: list[tuple[str | None, str]]) -> bool:
        (before_own, before_all), (own, in_all) = used(pins), used(after)
        return tenant is None or (
            (own[tenant] <= 60 or own[tenant] <= before_own[tenant]) and (in_all <= 100 or in_all <= before_all)
        )

    for kind, which, what in steps:
        if kind != "pin" and not pins:
            continue
        if kind == "end":
            budget.remove(*pins.pop(which % len(pins)))
        else:
            tenant, added, ended = which, what, []
            if kind == "move":
                ended = [pins[which % len(pins)]]
                tenant, added = ended[0][0], {what}
            after = pins.copy()
            for pin in ended:
                after.remove(pin)
            after += [(tenant, identity) for identity in sorted(added)]
            if fits(tenant, after):
                budget.check(tenant, {identity: SIZES[identity] for identity in added}, ended)
                for identity in added:
                    budget.add(tenant, identity, SIZES[identity])
                for pin in ended:
                    budget.remove(*pin)
                pins = after
            else:
                with pytest.raises(PinBudgetError, match="pinned-memory"):
                    budget.check(tenant, {identity: SIZES[identity] for identity in added}, ended)
        own, in_all = used(pins)
        assert budget._used_in_all == in_all
        assert [budget._used[tenant] for tenant in own] == list(own.values())
    for pin in pins:
        budget.remove(*pin)
    assert (budget._sizes, budget._pins, budget._all, budget._used) == ({}, Counter(), Counter(), Counter())
    with pytest.raises(RuntimeError, match="more pins were ended"):
        budget.remove("a", "p")


@pytest.mark.anyio
async def test_the_size_of_a_pin_is_computed(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    model = engine.model
    source = SoftPromptSource(digest="d", num_virtual_tokens=1000, is_key_values=False, path="x")
    assert pinned_bytes(source, model) == 1000 * 8 * 4
    half = msgspec.structs.replace(model, dtype="bfloat16")
    assert pinned_bytes(source, half) == 1000 * 8 * 2
    with_head = SoftPromptSource(digest="d", num_virtual_tokens=1000, is_key_values=True, path="x", num_labels=3)
    assert pinned_bytes(with_head, model) == 1000 * 2 * 2 * 2 * 4 * 4 + 3 * 8 * 4
    small = SoftPromptSource(digest="d", num_virtual_tokens=1, is_key_values=False, path="x")
    assert pinned_bytes(small, model) == LEAST_BYTES


@pytest.fixture
def app(make_app: MakeApp, settings: Settings, tmp_path: Path) -> FastAPI:
    """A pin takes 4 KiB; at most two fit per tenant and three in total."""
    store = replace(settings.store, pinned_bytes=3 * LEAST_BYTES, tenant_pinned_bytes=2 * LEAST_BYTES)
    return locked(make_app, replace(settings, store=store), tmp_path / "keys.toml", KEYS)


@pytest.fixture
def push(client: httpx.AsyncClient, upload_parts: UploadParts) -> Push:
    async def push(name: str, key: str = "a", **fields: Any) -> None:
        response = await client.post("/v1/prompts", headers=bearer(key), **upload_parts(name, **fields))
        assert response.status_code in {200, 201}, response.text

    return push


@pytest.fixture
def pin(client: httpx.AsyncClient) -> Pin:
    async def pin(name: str, key: str = "a", **body: Any) -> httpx.Response:
        return await client.post(f"/v1/prompts/{name}/warm", json={"pin": True} | body, headers=bearer(key))

    return pin


@pytest.mark.anyio
async def test_a_tenants_pins_are_limited(
    app: FastAPI,
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    push: Push,
    pin: Pin,
    eventually: WaitUntil,
) -> None:
    for seed, name in enumerate(("p", "q", "r")):
        await push(name, seed=seed)
    assert [(await pin(name)).status_code for name in ("p", "q", "p")] == [200] * 3
    prepared = len(engine.prepared)
    refused = await pin("r")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (409, "pin_budget_exceeded", "pin")
    assert refused.headers["x-should-retry"] == "false"
    assert f"hold {2 * LEAST_BYTES} of at most {2 * LEAST_BYTES}" in error["message"]
    assert (len(engine.prepared), len(engine.pinned)) == (prepared, 2)
    assert (await client.get("/v1/prompts/r", headers=bearer("a"))).json()["pinned"] == []
    eventually(lambda: len(store.leased) == len(store.released) + 2)
    # Warming without a pin works; pinning works after another pin has ended.
    assert (await pin("r", pin=None)).status_code == 200
    assert (await pin("p", pin=False)).status_code == 200
    assert (await pin("r")).status_code == 200
    assert (await client.delete("/v1/prompts/q", headers=bearer("a"))).status_code == 200
    assert (await pin("p")).status_code == 200


@pytest.mark.anyio
async def test_all_pins_together_are_limited(client: httpx.AsyncClient, push: Push, pin: Pin) -> None:
    for seed, (name, key) in enumerate((("p", "a"), ("q", "a"), ("r", "b"), ("s", "b"))):
        await push(name, key, seed=seed)
    assert [(await pin(name, key)).status_code for name, key in (("p", "a"), ("q", "a"), ("r", "b"))] == [200] * 3
    refused = await pin("s", "b")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pin_budget_exceeded")
    assert "(--pinned-memory)" in refused.json()["error"]["message"]


@pytest.mark.anyio
async def test_the_same_bytes_count_once(client: httpx.AsyncClient, push: Push, pin: Pin) -> None:
    for name in ("p", "q", "r"):
        await push(name, seed=1)
    assert [(await pin(name)).status_code for name in ("p", "q", "r")] == [200] * 3


@pytest.mark.anyio
async def test_a_multitask_prompt_counts_for_each_task(
    client: httpx.AsyncClient, other_parts: UploadParts, pin: Pin
) -> None:
    response = await client.post("/v1/prompts", headers=bearer("a"), **other_parts("many"))
    assert response.status_code == 201
    assert (await pin("many")).status_code == 409
    assert [(await pin("many", task_id=task)).status_code for task in (0, 1, 2)] == [200, 200, 409]


@pytest.mark.anyio
async def test_a_pin_that_follows_an_alias_makes_room_for_itself(
    client: httpx.AsyncClient, app: FastAPI, push: Push, pin: Pin
) -> None:
    await push("p", seed=1)
    await push("q", seed=2)
    assert [(await pin(name)).status_code for name in ("p", "q")] == [200] * 2
    await push("p", seed=3)  # the pin moves: two pins as before
    warmer = app.state.services.warmer
    await until(lambda: warmer.pinned_versions("p") == [2])
    await push("p", seed=4, rows=150)  # 4,800 bytes: too much with the other pin
    await until(lambda: not warmer._tasks)
    assert warmer.pinned_versions("p") == [2]
    assert (await pin("q", pin=False)).status_code == 200
    assert (await pin("p")).status_code == 200
    assert warmer.pinned_versions("p") == [3]


@pytest.mark.anyio
async def test_a_restarted_engine_gets_exactly_the_earlier_pins(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, push: Push, pin: Pin
) -> None:
    for seed, name in enumerate(("p", "q", "r")):
        await push(name, seed=seed)
    assert [(await pin(name)).status_code for name in ("p", "q")] == [200] * 2
    engine.on_restarted()
    await until(lambda: not app.state.services.warmer.is_restoring)
    assert len(engine.pinned) == 2
    assert (await pin("r")).status_code == 409
    assert app.state.services.warmer._budget._used["a"] == 2 * LEAST_BYTES


@pytest.mark.anyio
async def test_the_operators_pins_stay_and_reduce_the_budget_of_others(
    make_app: MakeApp, settings: Settings, tmp_path: Path, engine: FakeEngine, upload_parts: UploadParts
) -> None:
    store = replace(settings.store, pinned_bytes=LEAST_BYTES, pin=("p", "q@1"))
    app = locked(make_app, replace(settings, store=store), tmp_path / "keys.toml", KEYS)
    services = app.state.services
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await until(lambda: engine.alive and services.lifecycle.phase.value == "serving")
        for seed, name in enumerate(("p", "q", "r")):
            await client.post("/v1/prompts", headers=bearer("a"), **upload_parts(name, seed=seed))
        await services.warmer.start(preload=(), pin=("p", "q@1"))
        assert services.warmer._budget._used[None] == 2 * LEAST_BYTES
        refused = await client.post("/v1/prompts/r/warm", json={"pin": True}, headers=bearer("a"))
        assert refused.status_code == 409
        again = await client.post("/v1/prompts/p/warm", json={"pin": True}, headers=bearer("a"))
        assert again.status_code == 200


@pytest.mark.parametrize(
    ("has_keys", "store", "expected"),
    [
        (False, {}, (1000, 1000)),
        (True, {}, (1000, 500)),
        (True, {"pinned_bytes": 600}, (600, 300)),
        (True, {"pinned_bytes": 0, "tenant_pinned_bytes": 7}, (0, 7)),
    ],
)
def test_budgets_are_read_from_the_settings(
    settings: Settings, has_keys: bool, store: dict[str, Any], expected: tuple[int, int]
) -> None:
    engine = replace(settings.engine, soft_prompt_host_bytes=1000)
    budget = _pin_budget(replace(settings, engine=engine, store=replace(settings.store, **store)), has_keys=has_keys)
    assert (budget._total_bytes, budget._tenant_bytes) == expected
