"""How much each version is used, and which versions are not needed any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from prompt_store.catalog import deletion, lookups
from prompt_store.catalog.change import Change
from prompt_store.catalog.lookups import live
from prompt_store.catalog.over import trained_over
from prompt_store.catalog.records import Prompt
from prompt_store.catalog.schema import prompts, version_usage, versions
from prompt_store.changes import HistoryAction
from prompt_store.types import Access
from prompt_store.use import Use, VersionUse

_BATCH = 200
_COUNTED = ("requests", "errors", "prompt_tokens", "completion_tokens")


def add(connection: sa.Connection, uses: Mapping[tuple[str, int], Use], *, is_postgresql: bool) -> None:
    """Add to the use of versions, by name and version; versions that do not exist any more are skipped."""
    insert = (postgresql.insert if is_postgresql else sqlite.insert)(version_usage)
    newer = sa.case(
        (version_usage.c.last_used_at > insert.excluded.last_used_at, version_usage.c.last_used_at),
        else_=insert.excluded.last_used_at,
    )
    statement = insert.on_conflict_do_update(
        index_elements=[version_usage.c.version_id],
        set_={"last_used_at": newer, **{key: version_usage.c[key] + insert.excluded[key] for key in _COUNTED}},
    )
    # Ordered, so that two servers cannot deadlock.
    keys = sorted(uses)
    for first in range(0, len(keys), _BATCH):
        part = keys[first : first + _BATCH]
        found = connection.execute(
            sa.select(versions.c.id, prompts.c.name, versions.c.version)
            .join(prompts, prompts.c.id == versions.c.prompt_id)
            .where(sa.tuple_(prompts.c.name, versions.c.version).in_(part))
            .order_by(versions.c.id)
        ).all()
        for row in found:
            use = uses[row.name, row.version]
            values = {key: getattr(use, key) for key in (*_COUNTED, "last_used_at")}
            connection.execute(statement, {"version_id": row.id, **values})


def of_prompt(
    connection: sa.Connection, name: str, limit: int, before: int | None, access: Access | None
) -> tuple[list[VersionUse], bool]:
    """The use of the versions of a name below ``before``, newest first; and whether there are more.

    Raises:
        PromptNotFoundError: If there is no such name.
        PromptForbiddenError: If it is shared and the caller may not change it: the use is that of all tenants.
    """
    prompt = lookups.find(connection, name, access, to_change=True)
    query = _of_versions(prompt)
    if before is not None:
        query = query.where(versions.c.version < before)
    rows = connection.execute(query.order_by(versions.c.version.desc()).limit(limit + 1)).all()
    return [
        VersionUse(
            row.version,
            row.created_at,
            Use(
                row.requests or 0,
                row.prompt_tokens or 0,
                row.completion_tokens or 0,
                row.last_used_at or 0,
                row.errors or 0,
            ),
        )
        for row in rows[:limit]
    ], len(rows) > limit


def of_prompts(connection: sa.Connection, names: Collection[str], access: Access | None) -> dict[str, Use]:
    """The use of names, over their versions; without those that the caller may not change, as in ``of_prompt``."""
    used = version_usage.c
    query = (
        sa.select(
            prompts.c.name,
            prompts.c.owner,
            *(sa.func.coalesce(sa.func.sum(used[key]), 0).label(key) for key in _COUNTED),
            sa.func.coalesce(sa.func.max(used.last_used_at), 0).label("last_used_at"),
        )
        .join(versions, sa.and_(versions.c.prompt_id == prompts.c.id, live))
        .outerjoin(version_usage, used.version_id == versions.c.id)
        .where(prompts.c.name.in_(names))
        .group_by(prompts.c.name, prompts.c.owner)
    )
    return {
        row.name: Use(last_used_at=row.last_used_at, **{key: int(getattr(row, key)) for key in _COUNTED})
        for row in connection.execute(query)
        if access is None or access.changes(row.owner)
    }


def is_unused(since: int) -> sa.ColumnElement[bool]:
    """The condition that no version of a row of ``prompts`` was published or used at a time or later."""
    recent = (
        sa.select(versions.c.id)
        .outerjoin(version_usage, version_usage.c.version_id == versions.c.id)
        .where(
            versions.c.prompt_id == prompts.c.id,
            live,
            sa.or_(versions.c.created_at >= since, version_usage.c.last_used_at >= since),
        )
    )
    return ~recent.correlate(prompts).exists()


def prunable(
    connection: sa.Connection, prompt: Prompt, *, keep: int, before: int, spared: Collection[int]
) -> list[int]:
    """The versions of a name that ``prune`` deletes, oldest first."""
    newest: Sequence[int] = (
        connection.execute(
            sa.select(versions.c.version)
            .where(versions.c.prompt_id == prompt.id, live)
            .order_by(versions.c.version.desc())
            .limit(keep)
        )
        .scalars()
        .all()
    )
    never = {
        *spared,
        *newest,
        *deletion.pointed_at(connection, prompt).values(),
        *(version for rollout in lookups.rollouts_of(connection, prompt).values() for version in rollout.versions),
        *trained_over(connection, prompt.name),
    }
    rows = connection.execute(_of_versions(prompt).order_by(versions.c.version))
    return [
        row.version
        for row in rows
        if row.version not in never and row.created_at < before and (row.last_used_at or 0) < before
    ]


def prune(
    change: Change,
    name: str,
    access: Access | None,
    *,
    keep: int,
    before: int,
    spared: Collection[int],
    dry_run: bool,
) -> list[int]:
    """Delete versions of a name that are not needed any more; they can be restored like others.

    Args:
        change: The transaction.
        name: The soft prompt.
        access: What the caller may see and change.
        keep: Number of newest versions to keep.
        before: Only versions that were neither published nor used at this time or later (microseconds, UTC).
        spared: Versions to keep, such as pinned ones.
        dry_run: Whether to delete nothing.

    Returns:
        The versions.

    Raises:
        PromptNotFoundError: If there is no such name.
    """
    prompt = lookups.find(change.connection, name, access, to_change=True)
    found = prunable(change.connection, prompt, keep=keep, before=before, spared=spared)
    if not dry_run:
        for version in found:
            deletion.tombstone(change, prompt, [version], {}, HistoryAction.DELETE_VERSION, version)
    return found


def _of_versions(prompt: Prompt) -> sa.Select[tuple[int, int, int, int, int, int, int]]:
    used = version_usage.c
    return (
        sa.select(
            versions.c.version,
            versions.c.created_at,
            used.requests,
            used.errors,
            used.prompt_tokens,
            used.completion_tokens,
            used.last_used_at,
        )
        .outerjoin(version_usage, used.version_id == versions.c.id)
        .where(versions.c.prompt_id == prompt.id, live)
    )
