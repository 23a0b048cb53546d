"""Copies of a whole catalog, from and to either database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from prompt_store.catalog import schema
from prompt_store.catalog.database import Database
from prompt_store.errors import PromptConflictError, PromptStoreError

_BATCH = 1000


def snapshot(database: Database, path: Path) -> None:
    """Write a catalog to a new SQLite file: one state of it, whatever is written meanwhile.

    Raises:
        PromptStoreError: If the file cannot be written, or the database is damaged.
        StoreUnavailableError: If the database cannot be read.
    """
    if database.is_shared:
        with database.reading() as source, closing(Database(f"sqlite:///{path}")) as target:
            copy_tables(source, target)
    else:
        with database.reading() as connection, closing(sqlite3.connect(path)) as copy:
            source_driver = connection.connection.driver_connection
            if not isinstance(source_driver, sqlite3.Connection):
                raise TypeError("the connection to SQLite is not one of sqlite3")
            try:
                source_driver.backup(copy)  # pages of the database and of its write-ahead log
            except sqlite3.Error as error:
                raise PromptStoreError(f"the catalog {database} cannot be copied: {error}") from error
    with closing(sqlite3.connect(path)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")  # one file holds all of it


def require_empty(connection: sa.Connection, database: Database) -> None:
    """Raise PromptConflictError if a catalog holds, or held, soft prompts."""
    if connection.execute(sa.select(schema.prompts.c.id).limit(1)).first() is not None:
        raise PromptConflictError(f"the catalog {database} is not empty: restore into a new store")


def copy_tables(source: sa.Connection, target: Database) -> None:
    """Copy all rows in one transaction.

    Raises:
        PromptConflictError: If the target holds, or held, soft prompts.
        StoreUnavailableError: If the target cannot be written; it is unchanged.
    """
    with target.writing() as connection:
        require_empty(connection, target)
        connection.execute(schema.state.delete())
        connection.execute(schema.blobs.delete())  # left by uploads that failed
        for table in schema.metadata.sorted_tables:
            rows = source.execute(sa.select(table), execution_options={"yield_per": _BATCH})
            for part in rows.mappings().partitions(_BATCH):
                connection.execute(table.insert(), [dict(row) for row in part])
        if target.is_shared:
            for table in (schema.prompts, schema.versions, schema.history):
                _set_sequence(connection, table)


def _set_sequence(connection: sa.Connection, table: sa.Table) -> None:
    """Let PostgreSQL number new rows after the copied ones."""
    last = sa.select(sa.func.coalesce(sa.func.max(table.c.id), 0)).scalar_subquery()
    sequence = sa.func.pg_get_serial_sequence(table.name, "id")
    connection.execute(sa.select(sa.func.setval(sequence, last + 1, sa.false())))
