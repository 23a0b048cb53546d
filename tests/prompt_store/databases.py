"""Databases for tests of the catalog: an SQLite file, or a PostgreSQL database that is dropped at the end."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

POSTGRES_URL = os.environ.get("PRELUDE_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test")
NO_POSTGRES = (
    f"no PostgreSQL at {POSTGRES_URL}: start one (docker run -p 5432:5432 -e POSTGRES_HOST_AUTH_METHOD=trust "
    "-e POSTGRES_DB=test postgres:15) or set PRELUDE_TEST_POSTGRES to the URL of one that may create databases"
)


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'catalog.sqlite3'}"


@contextmanager
def postgres_url() -> Iterator[str]:
    """A new database; skips the test if no server is running."""
    server = sa.create_engine(
        sa.make_url(POSTGRES_URL).set(drivername="postgresql+psycopg"),
        isolation_level="AUTOCOMMIT",
        connect_args={"connect_timeout": 2},
    )
    name = f"prelude_test_{uuid.uuid4().hex[:12]}"
    try:
        with server.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    except sa.exc.OperationalError:
        pytest.skip(NO_POSTGRES)
    try:
        yield sa.make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
        server.dispose()


def refuse_connections(url: str, *, refuse: bool) -> None:
    """Make a database unreachable, or reachable again."""
    parsed = sa.make_url(url)
    server = sa.create_engine(
        sa.make_url(POSTGRES_URL).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with server.connect() as connection:
        connection.exec_driver_sql(f'ALTER DATABASE "{parsed.database}" ALLOW_CONNECTIONS {str(not refuse).lower()}')
        if refuse:
            connection.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                {"name": parsed.database},
            )
    server.dispose()
