"""The history of all names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from prompt_store.catalog import records
from prompt_store.catalog.change import Change
from prompt_store.catalog.schema import history
from prompt_store.changes import HistoryAction, HistoryEntry, HistoryFilter
from prompt_store.types import Access


def list_all(
    connection: sa.Connection, only: HistoryFilter, limit: int, before: int | None, access: Access | None
) -> tuple[list[HistoryEntry], bool]:
    """Entries of the names that the caller sees, newest first; and whether there are more.

    They are ordered by time, and by id within the same microsecond, because imported entries are older than their
    ids say.

    Args:
        connection: A connection.
        only: What is asked for.
        limit: Maximum number.
        before: The id of the entry that the page follows.
        access: What the caller may see.
    """
    conditions = _conditions(only)
    if before is not None:
        at = connection.execute(sa.select(history.c.at).where(history.c.id == before)).scalar_one_or_none()
        if at is None:
            return [], False
        conditions.append(sa.tuple_(history.c.at, history.c.id) < sa.tuple_(sa.literal(at), sa.literal(before)))
    query = _newest(conditions, limit + 1)
    owners = None if access is None else access.owners
    if owners is not None:
        # One part for each owner, which an index gives in order; an IN would read all entries of both.
        parts = [_newest([*conditions, history.c.owner == owner], limit + 1).subquery() for owner in owners]
        all_parts = sa.union_all(*(sa.select(part) for part in parts)).subquery()
        query = sa.select(all_parts).order_by(all_parts.c.at.desc(), all_parts.c.id.desc()).limit(limit + 1)
    rows = connection.execute(query).all()
    return [records.history_entry(row) for row in rows[:limit]], len(rows) > limit


def note_read(change: Change, name: str, owner: str, details: dict[str, object], version: int | None) -> None:
    """Record that an administrator has read what belongs to another tenant.

    Args:
        change: The transaction.
        name: The soft prompt; empty for a list.
        owner: Whose history it belongs to.
        details: What was read.
        version: The version that was read, if it was one.
    """
    change.add_entry(name, HistoryAction.READ_ACROSS_TENANTS, version=version, details=details, owner=owner)


def _conditions(only: HistoryFilter) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if only.name is not None:
        found.append(history.c.name == only.name)
    if only.actor is not None:
        found.append(sa.or_(history.c.actor == only.actor, history.c.actor_name == only.actor))
    if only.action is not None:
        found.append(history.c.action == only.action.value)
    if only.since is not None:
        found.append(history.c.at >= only.since)
    if only.until is not None:
        found.append(history.c.at < only.until)
    return found


def _newest(conditions: Sequence[sa.ColumnElement[bool]], limit: int) -> sa.Select[Any]:
    return sa.select(history).where(*conditions).order_by(history.c.at.desc(), history.c.id.desc()).limit(limit)
