"""What all servers of one PostgreSQL catalog have used of the limits of API keys.

A bucket of N a minute is one number: the time at which it will be full again. Taking an amount moves that time by
``amount * 60 / N`` seconds, from now if it is in the past. So a row means the same whoever reads it and whenever, and
a server that has just started knows as much as the others. All times are of the database's clock, because those of
the servers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.schema import key_buckets, key_running

LEASE_SECONDS = 10.0
"""Time after which the running requests of a server that was killed do not count any more."""

_SECOND = 1_000_000
_MINUTE = 60 * _SECOND

# Within a statement it goes on, so that a row is changed by the time at which its lock was obtained.
_CLOCK: sa.ColumnElement[int] = sa.literal_column(
    "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint", sa.BigInteger
)
# This one stands still, so that it is computed once for all rows.
_NOW: sa.ColumnElement[int] = sa.literal_column(
    "(extract(epoch FROM statement_timestamp()) * 1000000)::bigint", sa.BigInteger
)


class BucketId(NamedTuple):
    """Which bucket.

    Attributes:
        key: Name of the key in records.
        resource: What is counted: ``requests`` or ``tokens``.
        per_minute: The limit, which is also the capacity.
    """

    key: str
    resource: str
    per_minute: int


@dataclass(frozen=True, slots=True)
class SharedUse:
    """What the servers have used together.

    Attributes:
        full_in: Seconds until a bucket is full; one that is missing is full.
        elsewhere: Running requests of a key on other servers; zero for one that is missing.
    """

    full_in: Mapping[BucketId, float] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)


class SharedLimits:
    """The rows of a catalog that replicas share. Thread-safe; its methods block.

    Every method raises StoreUnavailableError if the catalog cannot be reached.

    Args:
        catalog: A catalog on PostgreSQL.
        cached: Its cache, which knows whether the catalog can be reached.
    """

    def __init__(self, catalog: Catalog, cached: CachedCatalog) -> None:
        self._catalog = catalog
        self._cached = cached

    def exchange(self, server: str, taken: Mapping[BucketId, float], running: Mapping[str, int]) -> SharedUse:
        """Add this server's use, and read that of all.

        Args:
            server: This server, by an id of its own.
            taken: What was taken from each bucket since the last exchange; negative if more was returned.
            running: The running requests of keys with a limit of them. A number is kept for ``LEASE_SECONDS``.
        """
        self._cached.require()
        if not taken and not running:
            with self._catalog.reading() as connection:
                return _read(connection, server)
        with self._catalog.writing() as connection:
            _add(connection, taken)
            _note_running(connection, server, running)
            return _read(connection, server)

    def leave(self, server: str) -> None:
        """Forget the running requests of a server that stops."""
        self._cached.require()
        with self._catalog.writing() as connection:
            connection.execute(key_running.delete().where(key_running.c.server == server))

    def clean(self) -> None:
        """Delete rows that mean the same as no row."""
        self._cached.require()
        for table, time in ((key_buckets, key_buckets.c.full_at), (key_running, key_running.c.until)):
            columns = list(table.primary_key.columns)
            # Rows that an exchange has locked are skipped: waiting for them could be a deadlock.
            old = sa.select(*columns).where(time < _NOW - _MINUTE).with_for_update(skip_locked=True)
            with self._catalog.writing() as connection:
                connection.execute(table.delete().where(sa.tuple_(*columns).in_(old)))


def _add(connection: sa.Connection, taken: Mapping[BucketId, float]) -> None:
    moved = sa.bindparam("moved", type_=sa.BigInteger)
    insert = postgresql.insert(key_buckets)
    statement = insert.values(full_at=_CLOCK + moved).on_conflict_do_update(
        index_elements=list(key_buckets.primary_key.columns),
        set_={"full_at": sa.func.greatest(key_buckets.c.full_at, _CLOCK) + moved},
    )
    # Ordered, so that two servers cannot deadlock.
    rows = [
        {**bucket._asdict(), "moved": round(amount * _MINUTE / bucket.per_minute)}
        for bucket, amount in sorted(taken.items())
    ]
    if rows:
        connection.execute(statement, rows)


def _note_running(connection: sa.Connection, server: str, running: Mapping[str, int]) -> None:
    insert = postgresql.insert(key_running)
    statement = insert.values(until=_CLOCK + int(LEASE_SECONDS * _SECOND)).on_conflict_do_update(
        index_elements=list(key_running.primary_key.columns),
        set_={"running": insert.excluded.running, "until": insert.excluded.until},
    )
    rows: list[dict[str, Any]] = [
        {"key": key, "server": server, "running": number} for key, number in sorted(running.items())
    ]
    if rows:
        connection.execute(statement, rows)


def _read(connection: sa.Connection, server: str) -> SharedUse:
    bucket = key_buckets.c
    owed = sa.select(bucket.key, bucket.resource, bucket.per_minute, (bucket.full_at - _NOW).label("owed"))
    others = (
        sa.select(key_running.c.key, sa.func.sum(key_running.c.running).label("running"))
        .where(key_running.c.server != server, key_running.c.until > _NOW)
        .group_by(key_running.c.key)
    )
    return SharedUse(
        {
            BucketId(row.key, row.resource, row.per_minute): row.owed / _SECOND
            for row in connection.execute(owed.where(bucket.full_at > _NOW))
        },
        {row.key: int(row.running) for row in connection.execute(others)},
    )
