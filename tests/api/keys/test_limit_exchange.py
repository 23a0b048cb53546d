"""Limits of keys that hold for several servers: the exchange with the catalog, and two servers on one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from prompt_store.catalog.schema import key_buckets, key_running
from prompt_store.errors import StoreUnavailableError
from prompt_store.limits.shared_limits import BucketId, SharedLimits, SharedUse
from server.api.keys import limit_exchange as module
from server.api.keys.key_file import read_keys
from server.api.keys.keys import ApiKeys
from server.api.keys.limit_exchange import LimitExchange
from server.app import create_app
from server.config import Settings, StoreSettings
from server.errors import RateLimitError
from server.metrics.metrics import Metrics
from tests.prompt_store.databases import postgres_url, refuse_connections
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import ready
from tests.support.keyed import bearer, key_entry, locked
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

LIMITED = "".join(
    [
        key_entry("few", scopes=["generate", "admin"], requests_per_minute=6),
        key_entry("short", scopes=["generate"], tokens_per_minute=60),
        key_entry("alone", scopes=["generate", "prompts:read"], max_concurrency=1),
        key_entry("free", scopes=["generate"]),
    ]
)


class FakeLimits:
    """The rows of a catalog as a script."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.found = SharedUse()
        self.calls: list[tuple[dict[BucketId, float], dict[str, int]]] = []
        self.left: list[str] = []
        self.num_cleaned = 0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def exchange(self, server: str, taken: Mapping[BucketId, float], running: Mapping[str, int]) -> SharedUse:
        self.calls.append((dict(taken), dict(running)))
        self.goes_on.wait(20)
        if self.error is not None:
            raise self.error
        return self.found

    def leave(self, server: str) -> None:
        self.left.append(server)
        if self.error is not None:
            raise self.error

    def clean(self) -> None:
        self.num_cleaned += 1
        if self.error is not None:
            raise self.error


class CountedOutcomes:
    """The part of the metrics that an exchange uses."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def count_limit_exchange(self, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def shared() -> FakeLimits:
    return FakeLimits()


@pytest.fixture
def metrics() -> CountedOutcomes:
    return CountedOutcomes()


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys.toml"
    path.write_text(LIMITED)
    return ApiKeys(read_keys(path))


@pytest.fixture
def exchange(shared: FakeLimits, metrics: CountedOutcomes, keys: ApiKeys) -> LimitExchange:
    return LimitExchange(cast("SharedLimits", shared), asyncio.to_thread, keys, cast("Metrics", metrics))


async def test_the_use_of_each_key_is_sent_once(shared: FakeLimits, keys: ApiKeys, exchange: LimitExchange) -> None:
    names = {key: keys.find(key).caller.name for key in ("few", "short", "alone")}
    await exchange.exchange()
    assert shared.calls == [({}, {})]
    with keys.find("few").caller.limiter.admitted(), keys.find("alone").caller.limiter.admitted():
        await exchange.exchange()
    with keys.find("short").caller.limiter.admitted() as allowance, keys.find("free").caller.limiter.admitted():
        allowance.reserve(40)
        await exchange.exchange()
        allowance.used = 30
    await exchange.exchange()
    await exchange.exchange()
    assert shared.calls[1:] == [
        ({(names["few"], "requests", 6): 1}, {names["alone"]: 1}),
        ({(names["short"], "tokens", 60): 40}, {names["alone"]: 0}),
        ({(names["short"], "tokens", 60): -10}, {}),
        ({}, {}),
    ]


async def test_keys_without_limits_do_not_use_the_catalog(
    shared: FakeLimits, metrics: CountedOutcomes, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(key_entry("free"))
    keys = ApiKeys(read_keys(path))
    made = LimitExchange(cast("SharedLimits", shared), asyncio.to_thread, keys, cast("Metrics", metrics))
    async with made.running():
        pass
    assert (shared.calls, shared.left, metrics.outcomes) == ([], [], [])
    path.write_text(key_entry("free", requests_per_minute=5))
    keys.replace(read_keys(path))
    await made.exchange()
    assert shared.calls == [({}, {})]
    assert list(keys.find("free").caller.limiter.common) == ["requests"]


@pytest.mark.parametrize("error", [StoreUnavailableError("the catalog is away"), RuntimeError("a fault")])
async def test_an_outage_is_logged_once_and_refuses_nothing(
    error: Exception,
    shared: FakeLimits,
    metrics: CountedOutcomes,
    keys: ApiKeys,
    exchange: LimitExchange,
    caplog: pytest.LogCaptureFixture,
) -> None:
    few, alone = keys.find("few").caller, keys.find("alone").caller
    shared.found = SharedUse({BucketId(str(few.name), "requests", 6): 600.0}, {str(alone.name): 1})
    await exchange.exchange()
    for caller in (few, alone):
        with pytest.raises(RateLimitError), caller.limiter.admitted():
            pass
    shared.error = error
    for _ in range(3):
        await exchange.exchange()
        with few.limiter.admitted(), alone.limiter.admitted():
            pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError)
    assert metrics.outcomes == ["success", *["failure"] * 3]
    shared.error = None
    for _ in range(2):
        await exchange.exchange()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "together again" in caplog.text
    # The last request came after the last failure; those before it may have arrived, so they are not sent again.
    assert [taken for taken, _ in shared.calls[-2:]] == [{(few.name, "requests", 6): 1}, {}]
    with pytest.raises(RateLimitError), few.limiter.admitted():
        pass


async def test_a_catalog_that_does_not_answer_is_not_waited_for(
    shared: FakeLimits, metrics: CountedOutcomes, exchange: LimitExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_EXCHANGE_SECONDS", 0.05)
    shared.goes_on.clear()
    shared.error = StoreUnavailableError("too late to matter")
    await exchange.exchange()
    await exchange.exchange()
    assert (len(shared.calls), metrics.outcomes) == (1, ["failure"] * 2)  # no second thread hangs
    shared.error = None
    shared.goes_on.set()
    monkeypatch.setattr(module, "MAX_EXCHANGE_SECONDS", 10)

    async def succeeds() -> bool:
        await exchange.exchange()
        return metrics.outcomes[-1] == "success"

    await until(succeeds)
    assert len(shared.calls) == 2


async def test_a_server_that_stops_leaves_nothing_running(
    shared: FakeLimits, keys: ApiKeys, exchange: LimitExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXCHANGE_SECONDS", 0.001)
    monkeypatch.setattr(module, "CLEAN_SECONDS", 0.0)
    async with exchange.running():
        with keys.find("alone").caller.limiter.admitted(), keys.find("few").caller.limiter.admitted():
            await until(lambda: any(running for _, running in shared.calls))
            await until(lambda: shared.num_cleaned >= 2)
    assert sum(sum(taken.values()) for taken, _ in shared.calls) == 1
    assert [set(running.values()) for _, running in shared.calls][-1] <= {0}
    with keys.find("alone").caller.limiter.admitted():
        async with exchange.running():
            pass
    assert len(shared.left) == 1


async def test_rows_that_cannot_be_deleted_end_nothing(
    shared: FakeLimits, exchange: LimitExchange, caplog: pytest.LogCaptureFixture
) -> None:
    shared.error = StoreUnavailableError("gone in this moment")
    await exchange._try(shared.clean)
    assert "gone in this moment" in caplog.text


# Two servers on one PostgreSQL


class TwoServers:
    """Two applications on one catalog, and their exchanges, which a test may start by itself."""

    def __init__(self, clients: list[httpx.AsyncClient], engines: list[FakeEngine], url: str) -> None:
        self.clients = clients
        self.engines = engines
        self.url = url
        self.exchanges: list[LimitExchange] = []

    async def ask(self, index: int, key: str = "few", **fields: object) -> httpx.Response:
        body = {"prompt": [1, 2, 3], "max_tokens": 3, **fields}
        return await self.clients[index].post("/v1/completions", json=body, headers=bearer(key))

    async def exchange(self) -> None:
        """Each server adds its use, and then each learns of all."""
        for one in self.exchanges * 2:
            await one.exchange()

    def pass_time(self, seconds: int) -> None:
        """Let the time of the catalog pass."""
        engine = sa.create_engine(sa.make_url(self.url).set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            connection.execute(key_buckets.update().values(full_at=key_buckets.c.full_at - seconds * 1_000_000))
            connection.execute(key_running.update().values(until=key_running.c.until - seconds * 1_000_000))
        engine.dispose()


@pytest.fixture
def catalog_url() -> Iterator[str]:
    with postgres_url() as found:
        yield found


@pytest.fixture
def exchange_seconds() -> float:
    return 3600.0


@pytest.fixture
async def servers(
    catalog_url: str,
    settings: Settings,
    tmp_path: Path,
    exchange_seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    still_clock: None,
) -> AsyncIterator[TwoServers]:
    monkeypatch.setattr(module, "EXCHANGE_SECONDS", exchange_seconds)
    found = TwoServers([], [], catalog_url)

    def make_exchange(*args: Any) -> LimitExchange:
        found.exchanges.append(LimitExchange(*args))
        return found.exchanges[-1]

    monkeypatch.setattr("server.api.services.LimitExchange", make_exchange)
    store = StoreSettings(location=str(tmp_path / "store"), catalog_url=catalog_url)
    async with AsyncExitStack() as stack:
        for index in range(2):
            engine = FakeEngine()

            def make(changed: Settings, engine: FakeEngine = engine) -> FastAPI:
                return create_app(changed, engine=engine, tokenizer=ByteTokenizer())  # type: ignore[arg-type]

            path = tmp_path / f"keys-{index}.toml"
            app = locked(make, replace(settings, store=store), path, LIMITED)
            found.clients.append(await stack.enter_async_context(ready(app)))
            found.engines.append(engine)
        yield found


async def test_two_servers_accept_the_limit_together(servers: TwoServers) -> None:
    for number in range(6):
        response = await servers.ask(number % 2)
        assert response.status_code == 200, response.text
        await servers.exchange()
    for index in range(2):
        refused = await servers.ask(index)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-limit-requests"] == "6"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < float(refused.headers["retry-after"]) <= 10
        text = (await servers.clients[index].get("/metrics", headers=bearer("few"))).text
        assert 'prelude_key_limit_exchanges_total{outcome="failure"} 0.0' in text
    assert (await servers.ask(0, "free")).status_code == 200


async def test_between_exchanges_each_server_accepts_at_most_what_it_sees(servers: TwoServers) -> None:
    """The bound: the limit, and what the other server accepts before the next exchanges. It is owed afterwards."""
    accepted = 0
    for index in range(2):
        for _ in range(8):
            accepted += (await servers.ask(index)).status_code == 200
    assert accepted == 6 + 6
    await servers.exchange()
    for index in range(2):
        refused = await servers.ask(index)
        assert refused.status_code == 429
        assert 60 < float(refused.headers["retry-after"]) <= 70  # six that are owed, and one more


async def test_headers_and_console_count_the_use_of_the_other_server(servers: TwoServers) -> None:
    assert (await servers.ask(0)).headers["x-ratelimit-remaining-requests"] == "5"
    used = (await servers.ask(0, "short", max_tokens=30)).json()["usage"]["total_tokens"]
    await servers.exchange()
    assert (await servers.ask(1)).headers["x-ratelimit-remaining-requests"] in ("4", "5")  # refilled in between
    response = await servers.ask(1, "short", max_tokens=1)
    left = int(response.headers["x-ratelimit-remaining-tokens"])
    taken = used + response.json()["usage"]["total_tokens"]
    assert 60 - taken <= left <= 60 - taken + 10
    me = await servers.clients[1].get("/v1/me", headers=bearer("short"))
    assert me.json()["limits"]["tokens_per_minute"]["remaining"] == left


async def test_what_was_used_is_refilled_for_all(servers: TwoServers) -> None:
    for _ in range(6):
        assert (await servers.ask(0)).status_code == 200
    await servers.exchange()
    assert (await servers.ask(1)).status_code == 429
    servers.pass_time(20)
    await servers.exchange()
    accepted = [(await servers.ask(1)).status_code == 200 for _ in range(4)]
    assert accepted == [True, True, False, False]
    servers.pass_time(600)
    await servers.exchange()
    assert (await servers.ask(1)).headers["x-ratelimit-remaining-requests"] == "3"


async def test_without_the_catalog_each_server_counts_alone(
    servers: TwoServers, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(6):
        assert (await servers.ask(0)).status_code == 200
    await servers.exchange()
    assert (await servers.ask(1)).status_code == 429
    refuse_connections(servers.url, refuse=True)
    await servers.exchange()
    accepted = [(await servers.ask(1)).status_code == 200 for _ in range(7)]
    assert accepted == [True] * 6 + [False]  # as many as a single server
    assert (await servers.ask(0)).status_code == 429  # its own use still counts
    await servers.exchange()
    text = (await servers.clients[1].get("/metrics", headers=bearer("few"))).text
    failures = next(line for line in text.splitlines() if 'exchanges_total{outcome="failure"}' in line)
    assert float(failures.rpartition(" ")[2]) >= 4
    alone = [record for record in caplog.records if "hold for this server alone" in record.message]
    assert len(alone) == 2  # once per server
    refuse_connections(servers.url, refuse=False)

    async def are_together() -> bool:
        await servers.exchange()
        return sum("together again" in record.message for record in caplog.records) == 2

    await until(are_together)
    for index in range(2):
        assert (await servers.ask(index)).status_code == 429


async def test_places_are_counted_together(servers: TwoServers) -> None:
    async def ask(index: int) -> httpx.Response:
        return await servers.ask(index, "alone", max_tokens=10)

    servers.engines[0].step_seconds = 0.05
    first = asyncio.create_task(ask(0))
    await until(lambda: servers.engines[0].requests)
    await servers.exchange()
    refused = await ask(1)
    assert refused.status_code == 429
    assert "requests at once" in refused.json()["error"]["message"]
    me = await servers.clients[1].get("/v1/me", headers=bearer("alone"))
    assert me.json()["limits"]["max_concurrency"] == {"limit": 1, "remaining": 0}
    assert (await first).status_code == 200
    await servers.exchange()
    assert (await ask(1)).status_code == 200


@pytest.mark.parametrize("exchange_seconds", [0.02])
async def test_the_exchange_runs_beside_the_requests(servers: TwoServers, exchange_seconds: float) -> None:
    """At a pace of more than two exchanges, two servers accept the limit and what is refilled meanwhile."""
    loop = asyncio.get_running_loop()

    async def remaining(index: int) -> int:
        me = await servers.clients[index].get("/v1/me", headers=bearer("short"))
        found: int = me.json()["limits"]["tokens_per_minute"]["remaining"]
        return found

    def sees_at_most(index: int, tokens: float) -> Callable[[], Any]:
        async def sees() -> bool:
            return await remaining(index) <= tokens

        return sees

    began, used = loop.time(), 0
    for number in range(40):
        response = await servers.ask(number % 2, "short")
        if response.status_code == 429:
            break
        used += response.json()["usage"]["total_tokens"]
        left = 60 - used + (loop.time() - began + 1)
        await until(sees_at_most((number + 1) % 2, max(left, 0)))
    assert 50 <= used <= 60 + (loop.time() - began)
