"""The database of the catalog, SQLite or PostgreSQL: connections, schema migrations, transactions.

SQLite runs in write-ahead mode with ``synchronous=FULL``: acknowledged changes survive ``kill -9`` and a power cut.
PostgreSQL does the same by default (``synchronous_commit``).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from prompt_store.errors import PromptStoreError, StoreUnavailableError

CONNECT_SECONDS = 3
STATEMENT_SECONDS = 30
"""No statement takes this long, unless it waits for a lock that is never released."""

_MIGRATION_LOCK = 0x7072656C756465
"""The advisory lock of PostgreSQL for migrations: replicas may start at the same time."""

_APPLICATION = "prelude/adapters"
_OLDER_APPLICATION = "prelude"
"""The name of the connections of releases that cannot read adapters."""

_UNAVAILABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, sa.exc.InternalError)


class Database:
    """One database with its connection pool.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://USER@HOST:PORT/DATABASE``.
        is_migrated: Whether to create the tables, and to migrate those of an older release. Otherwise they must
            exist and be those of this release.

    Attributes:
        is_shared: Whether other processes may write to it.

    Raises:
        PromptStoreError: If the URL or its driver cannot be used, or a newer release has written the database;
            without migration, if any other release has.
        StoreUnavailableError: If the database cannot be reached.
    """

    def __init__(self, url: str, *, is_migrated: bool = True) -> None:
        parsed = read_url(url)
        self.is_shared = parsed.get_backend_name() == "postgresql"
        self._url = parsed
        self._is_created = not is_migrated
        if self.is_shared:
            self._engine = _postgresql(parsed)
        elif parsed.get_backend_name() == "sqlite" and parsed.database:
            self._engine = sa.create_engine(parsed, creator=self._connect_sqlite)
            sa.event.listen(self._engine, "connect", _configure_sqlite)
        else:
            raise PromptStoreError(f"the catalog must be sqlite:///PATH or postgresql://..., not {str(parsed)!r}")
        try:
            if is_migrated:
                self._upgrade()
            else:
                self._require_schema()
        except sa.exc.DatabaseError as error:  # the file is not a catalog, or this user has no permission
            self._engine.dispose()
            raise PromptStoreError(f"the catalog {self} cannot be used: {_reason(error)}") from error
        except BaseException:
            self._engine.dispose()
            raise
        self._is_created = True

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection whose statements see one snapshot of the database.

        Raises:
            StoreUnavailableError: If the database cannot be reached, or the connection is lost.
        """
        with _translated(self), self._engine.connect() as connection:
            if self.is_shared:
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            else:
                connection.exec_driver_sql("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction, committed unless the block raises; on SQLite the only one that writes.

        Raises:
            StoreUnavailableError: If the database cannot be reached or written, or the connection is lost.
        """
        with _translated(self), self._engine.connect() as connection:
            if not self.is_shared:
                # SQLite would lock at the first write, and fail if another process had written since our read.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    def listen(self, channel: str) -> Listener:
        """A separate connection that receives the notifications of a channel.

        Raises:
            StoreUnavailableError: If the database cannot be reached.
        """
        with _translated(self):
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            connection.detach()
            listener = Listener(self, connection)
            connection.exec_driver_sql(f'LISTEN "{channel}"')
        return listener

    def schema_revision(self) -> str:
        """The revision of the tables; empty if there are none."""
        with self.reading() as connection:
            return _revision(connection)

    def has_older_clients(self, connection: sa.Connection) -> bool:
        """Whether a release that cannot read adapters is connected to a PostgreSQL database."""
        query = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = :name"
        )
        return self.is_shared and connection.execute(query, {"name": _OLDER_APPLICATION}).scalar_one() > 0

    def _require_schema(self) -> None:
        found, needed = self.schema_revision(), _newest_revision()
        if found != needed:
            raise PromptStoreError(
                f"the catalog {self} has the schema {found or 'of nothing'}, this release has {needed}: "
                "use the release that wrote it, or start a server of this release on it first"
            )

    def _connect_sqlite(self) -> sqlite3.Connection:
        """Open the file, and create it only at the start: later, a missing file means an unmounted volume."""
        mode = "rw" if self._is_created else "rwc"
        path = quote(self._url.database or "")
        return sqlite3.connect(f"file:{path}?mode={mode}", uri=True, check_same_thread=False)

    def _upgrade(self) -> None:
        config = _alembic()
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with self.writing() as connection:
            if self.is_shared:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            if _revision(connection) == _newest_revision():
                return
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise PromptStoreError(
                    f"the catalog {self} was written by a newer release ({error}): use a newer release"
                ) from error


def _revision(connection: sa.Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""


@cache
def _newest_revision() -> str:
    """The revision of this release."""
    return ScriptDirectory.from_config(_alembic()).get_current_head() or ""


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config


def read_url(url: str) -> sa.URL:
    """Parse the URL of a catalog.

    Raises:
        PromptStoreError: If it is not valid.
    """
    try:
        return sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:  # ValueError: the port is not a number
        raise PromptStoreError(f"the catalog's URL {url[:200]!r} cannot be read: {error}") from error


class Listener:
    """A connection that receives notifications; created by ``Database.listen``."""

    def __init__(self, database: Database, connection: sa.Connection) -> None:
        self._database = database
        self._connection = connection

    def wait(self, seconds: float) -> None:
        """Return at the next notification, or after the given number of seconds.

        Raises:
            StoreUnavailableError: If the connection is lost.
        """
        with _translated(self._database):
            driver: Any = self._connection.connection.dbapi_connection
            try:
                for _ in driver.notifies(timeout=seconds, stop_after=1):
                    pass
            except Exception as error:
                reason = " ".join(str(error).split())
                raise StoreUnavailableError(
                    f"the connection to the catalog {self._database} was lost: {reason}"
                ) from error

    def scalar(self, query: sa.Select[Any]) -> Any:
        """The only value of a query.

        Raises:
            StoreUnavailableError: If the connection is lost.
        """
        with _translated(self._database):
            return self._connection.execute(query).scalar_one()

    def close(self) -> None:
        """Close the connection."""
        with suppress(sa.exc.SQLAlchemyError):  # it may be broken already
            self._connection.close()


def _postgresql(url: sa.URL) -> sa.Engine:
    try:
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_timeout=CONNECT_SECONDS,
            max_overflow=10,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                # A server that disappeared is noticed in seconds, not after the quarter of an hour of TCP.
                "keepalives_idle": CONNECT_SECONDS,
                "keepalives_interval": 1,
                "keepalives_count": 3,
                "tcp_user_timeout": CONNECT_SECONDS * 1000,
                "options": f"-c statement_timeout={STATEMENT_SECONDS * 1000}",
                "application_name": _APPLICATION,
                # Prepared statements do not work with a pooler that changes the connection for each transaction.
                "prepare_threshold": None,
            },
        )
    except ModuleNotFoundError as error:
        raise PromptStoreError(
            "a PostgreSQL catalog needs psycopg 3: pip install 'prelude-server[postgres]'"
        ) from error


def _configure_sqlite(connection: Any, _record: object) -> None:
    # reading() and writing() begin transactions; sqlite3 would begin them later.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


@contextmanager
def _translated(database: Database) -> Iterator[None]:
    try:
        yield
    except _UNAVAILABLE as error:
        raise StoreUnavailableError(f"the catalog {database} cannot be used now: {_reason(error)}") from error


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    """The first line of the message of the database."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
