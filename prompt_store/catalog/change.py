"""One transaction that changes names, and its entries in the history."""

from __future__ import annotations

import time
from collections.abc import Collection

import sqlalchemy as sa

from prompt_store.catalog import lookups
from prompt_store.catalog.records import Prompt
from prompt_store.catalog.schema import aliases, blobs, history
from prompt_store.types import HistoryAction


class Change:
    """One transaction that changes names.

    Attributes:
        connection: Its connection.
        revision: The revision of the catalog after it.
        at: Time of the change, in microseconds since 1970, UTC.
        has_entries: Whether it has changed anything.
    """

    def __init__(self, connection: sa.Connection, revision: int, actor: str | None) -> None:
        self.connection = connection
        self.at = now()
        self.has_entries = False
        self.revision = revision
        self._actor = actor

    def add_entry(
        self,
        name: str,
        action: HistoryAction,
        *,
        alias: str | None = None,
        version: int | None = None,
        previous: int | None = None,
    ) -> None:
        """Add an entry to the history."""
        self.has_entries = True
        values = {
            "revision": self.revision,
            "name": name,
            "action": action.value,
            "alias": alias,
            "version": version,
            "previous_version": previous,
            "actor": self._actor,
            "at": self.at,
        }
        self.connection.execute(history.insert().values(values))

    def move_alias(self, prompt: Prompt, alias: str, version: int, action: HistoryAction) -> None:
        """Point an alias at a version; no entry is added if it points there already."""
        previous = lookups.alias_target(self.connection, prompt, alias)
        if previous == version:
            return
        mine = sa.and_(aliases.c.prompt_id == prompt.id, aliases.c.alias == alias)
        if previous is None:
            values = {"prompt_id": prompt.id, "alias": alias, "version": version}
            self.connection.execute(aliases.insert().values(values))
        else:
            self.connection.execute(aliases.update().where(mine).values(version=version))
        self.add_entry(prompt.name, action, alias=alias, version=version, previous=previous)

    def remove_alias(self, prompt: Prompt, alias: str, previous: int) -> None:
        """Remove an alias."""
        self.connection.execute(aliases.delete().where(aliases.c.prompt_id == prompt.id, aliases.c.alias == alias))
        self.add_entry(prompt.name, HistoryAction.DELETE_ALIAS, alias=alias, previous=previous)


def lock_blobs(connection: sa.Connection, digests: Collection[str]) -> None:
    """Lock in the order of ``Catalog.reserve``; otherwise two uploads of the same files could deadlock."""
    query = sa.select(blobs.c.sha256).where(blobs.c.sha256.in_(digests)).order_by(blobs.c.sha256)
    connection.execute(query.with_for_update()).all()


def now() -> int:
    """The time in microseconds since 1970, UTC."""
    return time.time_ns() // 1000
