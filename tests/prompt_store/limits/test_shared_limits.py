"""The use of keys' limits in a PostgreSQL catalog, by several servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog import database as database_module
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.catalog.schema import key_buckets, key_running
from prompt_store.errors import StoreUnavailableError
from prompt_store.limits import shared_limits as module
from prompt_store.limits.shared_limits import BucketId, SharedLimits
from tests.prompt_store.databases import postgres_url, refuse_connections, sqlite_url

BUCKET = BucketId("key-1", "tokens", 60)
"""One token is one second."""


@pytest.fixture
def url() -> Iterator[str]:
    with postgres_url() as found:
        yield found


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(Database(url))
    yield opened
    opened.close()


@pytest.fixture
def limits(catalog: Catalog) -> SharedLimits:
    return SharedLimits(catalog, CachedCatalog(catalog))


def rows_of(catalog: Catalog) -> tuple[int, int]:
    """The number of rows for buckets and for running requests."""
    count = sa.func.count()
    with catalog.reading() as connection:
        buckets = connection.execute(sa.select(count).select_from(key_buckets)).scalar_one()
        return buckets, connection.execute(sa.select(count).select_from(key_running)).scalar_one()


def age(catalog: Catalog, seconds: int) -> None:
    """Let time pass."""
    with catalog.writing() as connection:
        connection.execute(key_buckets.update().values(full_at=key_buckets.c.full_at - seconds * 1_000_000))
        connection.execute(key_running.update().values(until=key_running.c.until - seconds * 1_000_000))


def test_what_servers_take_adds_up(limits: SharedLimits) -> None:
    assert limits.exchange("a", {}, {}).full_in == {}
    assert limits.exchange("a", {BUCKET: 20}, {}).full_in[BUCKET] == pytest.approx(20, abs=1)
    other = BucketId("key-1", "requests", 60)
    found = limits.exchange("b", {BUCKET: 30, other: 1}, {}).full_in
    assert found[BUCKET] == pytest.approx(50, abs=1)
    assert found[other] == pytest.approx(1, abs=0.5)
    assert limits.exchange("a", {BUCKET: -15}, {}).full_in[BUCKET] == pytest.approx(35, abs=1)
    # Several servers may take more than there is; it is owed.
    assert limits.exchange("c", {BUCKET: 100}, {}).full_in[BUCKET] == pytest.approx(135, abs=1)
    changed = BucketId("key-1", "tokens", 120)
    assert limits.exchange("a", {changed: 2}, {}).full_in[changed] == pytest.approx(1, abs=0.5)


def test_a_bucket_is_refilled_and_never_holds_more_than_its_limit(catalog: Catalog, limits: SharedLimits) -> None:
    limits.exchange("a", {BUCKET: 50}, {})
    age(catalog, 30)
    assert limits.exchange("b", {}, {}).full_in[BUCKET] == pytest.approx(20, abs=1)
    age(catalog, 1000)
    assert limits.exchange("b", {}, {}).full_in == {}
    assert limits.exchange("b", {BUCKET: 10}, {}).full_in[BUCKET] == pytest.approx(10, abs=1)
    assert limits.exchange("a", {BUCKET: -1000}, {}).full_in == {}
    assert limits.exchange("b", {BUCKET: 10}, {}).full_in[BUCKET] == pytest.approx(10, abs=1)


def test_running_requests_count_elsewhere_until_their_server_ends(catalog: Catalog, limits: SharedLimits) -> None:
    assert limits.exchange("a", {}, {"key-1": 2, "key-2": 1}).elsewhere == {}
    assert limits.exchange("b", {}, {"key-1": 3}).elsewhere == {"key-1": 2, "key-2": 1}
    assert limits.exchange("c", {}, {}).elsewhere == {"key-1": 5, "key-2": 1}
    limits.exchange("a", {}, {"key-1": 1, "key-2": 0})
    assert limits.exchange("c", {}, {}).elsewhere == {"key-1": 4, "key-2": 0}
    limits.leave("b")
    assert limits.exchange("c", {}, {}).elsewhere == {"key-1": 1, "key-2": 0}
    age(catalog, int(module.LEASE_SECONDS) + 1)
    assert limits.exchange("c", {}, {}).elsewhere == {}


def test_cleaning_changes_no_answer(catalog: Catalog, limits: SharedLimits) -> None:
    limits.exchange("a", {BUCKET: 10}, {"key-1": 1})
    age(catalog, 200)
    recent = BUCKET._replace(key="key-2")
    limits.exchange("a", {recent: 10}, {"key-2": 1})
    limits.exchange("b", {}, {"key-3": 1})
    assert rows_of(catalog) == (2, 3)
    before = limits.exchange("b", {}, {})
    limits.clean()
    after = limits.exchange("b", {}, {})
    assert rows_of(catalog) == (1, 2)
    assert after.elsewhere == before.elsewhere == {"key-2": 1}
    assert after.full_in.keys() == before.full_in.keys() == {recent}


def test_cleaning_does_not_wait_for_an_exchange(catalog: Catalog, limits: SharedLimits) -> None:
    limits.exchange("a", {BUCKET: 10}, {})
    age(catalog, 200)
    with catalog.writing() as connection:
        connection.execute(key_buckets.update().values(full_at=key_buckets.c.full_at))
        cleaning = threading.Thread(target=limits.clean)
        cleaning.start()
        cleaning.join(10)
        assert not cleaning.is_alive()
    assert rows_of(catalog) == (1, 0)


def test_exchanges_at_the_same_time_lose_nothing(url: str) -> None:
    """Many keys in different orders from several connections: no deadlock, and every token counts."""
    buckets = [BUCKET._replace(key=f"key-{index}", per_minute=10**6) for index in range(20)]
    with ExitStack() as stack:
        servers = []
        for _ in range(4):
            catalog = Catalog(Database(url))
            stack.callback(catalog.close)
            servers.append(SharedLimits(catalog, CachedCatalog(catalog)))
        failures: list[Exception] = []

        def work(number: int, shared: SharedLimits) -> None:
            try:
                for _ in range(15):
                    order = buckets if number % 2 else buckets[::-1]
                    shared.exchange(f"server-{number}", dict.fromkeys(order, 10_000), {})
                    shared.clean()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(servers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        found = servers[0].exchange("last", {}, {}).full_in
    # 4 * 15 * 10,000 tokens at a million a minute are 36 s, without the seconds that this test takes.
    assert len(found) == 20
    assert all(16 < seconds <= 36 for seconds in found.values())


def test_a_catalog_that_is_away_is_reported(url: str, limits: SharedLimits) -> None:
    refuse_connections(url, refuse=True)
    for call in (lambda: limits.exchange("a", {BUCKET: 1}, {}), lambda: limits.leave("a"), limits.clean):
        with pytest.raises(StoreUnavailableError):
            call()
    refuse_connections(url, refuse=False)
    assert limits.exchange("a", {}, {}).full_in == {}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_schema_is_migrated_up_and_down_with_data(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        location = sqlite_url(tmp_path) if kind == "sqlite" else stack.enter_context(postgres_url())
        database = Database(location)
        stack.callback(database.close)
        bucket = {"key": "key-1", "resource": "tokens", "per_minute": 60, "full_at": 2**62}
        running = {"key": "key-1", "server": "a", "running": 1, "until": 2**62}
        with database.writing() as connection:
            connection.execute(key_buckets.insert().values(bucket))
            connection.execute(key_running.insert().values(running))
            config = database_module._alembic()
            config.attributes["connection"] = connection
            command.downgrade(config, "0009")
            assert not {"key_buckets", "key_running"} & set(sa.inspect(connection).get_table_names())
            command.upgrade(config, "head")
            assert connection.execute(sa.select(key_buckets)).all() == []
            connection.execute(key_buckets.insert().values(bucket))
            connection.execute(key_running.insert().values(running))
        assert database.schema_revision() == "0010"
