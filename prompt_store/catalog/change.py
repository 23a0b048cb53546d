"""One transaction that changes names, and its entries in the history."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping

import sqlalchemy as sa

from prompt_store.catalog import lookups
from prompt_store.catalog.records import Prompt, rollout_value
from prompt_store.catalog.schema import aliases, blobs, history, prompts
from prompt_store.changes import Actor, By, HistoryAction, ImportedEntry
from prompt_store.rollouts import NO_ROLLOUT, Rollout


class Change:
    """One transaction that changes names.

    Attributes:
        connection: Its connection.
        revision: The revision of the catalog after it.
        at: Time of the change, in microseconds since 1970, UTC.
        has_entries: Whether it has changed anything.
        actor: Who makes it, and why.
    """

    def __init__(self, connection: sa.Connection, revision: int, actor: By) -> None:
        self.connection = connection
        self.at = now()
        self.has_entries = False
        self.revision = revision
        self.actor = Actor.of(actor)

    def add_entry(
        self,
        name: str,
        action: HistoryAction,
        *,
        alias: str | None = None,
        version: int | None = None,
        previous: int | None = None,
        details: Mapping[str, object] | None = None,
        owner: str | None = None,
    ) -> None:
        """Add an entry to the history.

        Args:
            name: The soft prompt; empty if the entry is about no single one.
            action: The kind of change.
            alias: The alias that was moved or removed.
            version: The version that the change is about.
            previous: The previous target of the alias.
            details: What was edited.
            owner: Whose history it belongs to; None for that of the soft prompt's owner.
        """
        self.has_entries = True
        of_name = sa.select(prompts.c.owner).where(prompts.c.name == name).scalar_subquery()
        values = {
            "revision": self.revision,
            "name": name,
            "action": action.value,
            "alias": alias,
            "version": version,
            "previous_version": previous,
            "actor": self.actor.id,
            "actor_name": self.actor.name,
            "reason": self.actor.reason,
            "details": json.dumps(dict(details), allow_nan=False) if details else None,
            "owner": sa.func.coalesce(of_name, "") if owner is None else owner,
            "at": self.at,
        }
        self.connection.execute(history.insert().values(values))

    def add_imported(self, prompt: Prompt, entry: ImportedEntry) -> None:
        """Add an entry of another store's history, with its time and actor."""
        self.has_entries = True
        values = {
            "revision": self.revision,
            "name": prompt.name,
            "action": entry.action.value,
            "alias": entry.alias,
            "version": entry.version,
            "previous_version": entry.previous_version,
            "actor": entry.actor,
            "actor_name": entry.actor_name,
            "reason": entry.reason,
            "details": json.dumps(dict(entry.details), allow_nan=False) if entry.details else None,
            "owner": prompt.owner,
            "imported": True,
            "at": entry.at,
        }
        self.connection.execute(history.insert().values(values))

    def move_alias(
        self, prompt: Prompt, alias: str, version: int, action: HistoryAction, rollout: Rollout = NO_ROLLOUT
    ) -> None:
        """Point an alias at a version, with a rollout or none; an entry is added for each that has changed."""
        previous = lookups.alias_target(self.connection, prompt, alias)
        before = lookups.rollout_of(self.connection, prompt, alias)
        if (previous, before) == (version, rollout):
            return
        mine = sa.and_(aliases.c.prompt_id == prompt.id, aliases.c.alias == alias)
        values = {"version": version, "rollout": rollout_value(version, rollout)}
        if previous is None:
            self.connection.execute(aliases.insert().values(prompt_id=prompt.id, alias=alias, **values))
        else:
            self.connection.execute(aliases.update().where(mine).values(values))
        if previous != version:
            self.add_entry(prompt.name, action, alias=alias, version=version, previous=previous)
        self._add_rollout(prompt, alias, version, before, rollout)

    def _add_rollout(self, prompt: Prompt, alias: str, version: int, before: Rollout, after: Rollout) -> None:
        if before != after:
            details = {"from": before.to_json(), "to": after.to_json()}
            self.add_entry(prompt.name, HistoryAction.ROLLOUT, alias=alias, version=version, details=details)

    def remove_alias(self, prompt: Prompt, alias: str, previous: int) -> None:
        """Remove an alias; its rollout ends before."""
        before = lookups.rollout_of(self.connection, prompt, alias)
        self._add_rollout(prompt, alias, previous, before, NO_ROLLOUT)
        self.connection.execute(aliases.delete().where(aliases.c.prompt_id == prompt.id, aliases.c.alias == alias))
        self.add_entry(prompt.name, HistoryAction.DELETE_ALIAS, alias=alias, previous=previous)


def lock_blobs(connection: sa.Connection, digests: Collection[str]) -> None:
    """Lock in the order of ``Catalog.reserve``; otherwise two uploads of the same files could deadlock."""
    query = sa.select(blobs.c.sha256).where(blobs.c.sha256.in_(digests)).order_by(blobs.c.sha256)
    connection.execute(query.with_for_update()).all()


def now() -> int:
    """The time in microseconds since 1970, UTC."""
    return time.time_ns() // 1000
