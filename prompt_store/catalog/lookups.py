"""Lookups of names, versions and aliases inside a transaction of the catalog."""

from __future__ import annotations

import json

import sqlalchemy as sa

from prompt_store.catalog import records
from prompt_store.catalog.records import Prompt
from prompt_store.catalog.schema import aliases, history, prompts, versions
from prompt_store.changes import HistoryAction
from prompt_store.errors import AliasNotFoundError, PromptConflictError, PromptForbiddenError, PromptNotFoundError
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import Access, PromptVersion

live = versions.c.deleted_at.is_(None)
"""The condition that a version is not deleted."""


def visible(owner: sa.ColumnElement[str], access: Access | None) -> sa.ColumnElement[bool]:
    """The condition that a caller sees the soft prompts of an owner."""
    owners = None if access is None else access.owners
    return sa.true() if owners is None else owner.in_(owners)


def find(connection: sa.Connection, name: str, access: Access | None, *, to_change: bool = False) -> Prompt:
    """A name that has versions; raises what ``find_known`` does."""
    return _find(connection, sa.and_(prompts.c.name == name, prompts.c.num_versions > 0), name, access, to_change)


def find_known(connection: sa.Connection, name: str, access: Access | None, *, to_change: bool = False) -> Prompt:
    """A name that has or had versions.

    Raises:
        PromptNotFoundError: If it does not exist or belongs to another tenant; the error is the same.
        PromptForbiddenError: If ``to_change`` is set and the caller may only use it.
    """
    return _find(connection, prompts.c.name == name, name, access, to_change)


def _find(
    connection: sa.Connection, which: sa.ColumnElement[bool], name: str, access: Access | None, to_change: bool
) -> Prompt:
    row = connection.execute(sa.select(prompts).where(which)).one_or_none()
    if row is None or not (access is None or access.sees(row.owner)):
        raise PromptNotFoundError(f"soft prompt {name!r} does not exist")
    if to_change and not (access is None or access.changes(row.owner)):
        raise PromptForbiddenError(f"the soft prompt {name!r} is shared; this key may use it but not change it")
    return Prompt(row.id, row.name, row.last_version, row.owner)


def publishable_prompt(connection: sa.Connection, name: str, owner: str) -> Prompt | None:
    """A name that an owner may publish under, with or without versions; None if it never existed.

    Raises:
        PromptConflictError: If the name belongs, or belonged, to another owner.
    """
    row = connection.execute(sa.select(prompts).where(prompts.c.name == name)).one_or_none()
    if row is None:
        return None
    if row.owner != owner:
        hint = "" if row.owner else " by a shared soft prompt: its versions are published as shared ones"
        raise PromptConflictError(f"the name {name!r} is taken{hint}")
    return Prompt(row.id, row.name, row.last_version, row.owner)


def version_of(connection: sa.Connection, prompt: Prompt, version: int) -> PromptVersion:
    """One version of a name; PromptNotFoundError if there is none."""
    query = sa.select(versions).where(versions.c.prompt_id == prompt.id, versions.c.version == version, live)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise PromptNotFoundError(f"soft prompt {prompt.name!r} has no version {version}")
    return records.versions_of(connection, [row], {prompt.id: prompt})[0]


def with_digest(
    connection: sa.Connection, digest: str, over: str | None, access: Access | None, limit: int
) -> list[PromptVersion]:
    """Versions with a digest, over the same adapter, by name; at most ``limit`` of those that a caller sees."""
    query = (
        sa.select(versions, prompts.c.name, prompts.c.last_version, prompts.c.owner)
        .join(prompts, prompts.c.id == versions.c.prompt_id)
        .where(versions.c.digest == digest, versions.c.over == over, live, visible(prompts.c.owner, access))
        .order_by(prompts.c.name, versions.c.version)
        .limit(limit)
    )
    rows = connection.execute(query).all()
    known = {row.prompt_id: Prompt(row.prompt_id, row.name, row.last_version, row.owner) for row in rows}
    return records.versions_of(connection, rows, known)


def has_version(connection: sa.Connection, prompt: Prompt, version: int) -> bool:
    """Whether a name has a version."""
    query = sa.select(versions.c.id).where(versions.c.prompt_id == prompt.id, versions.c.version == version, live)
    return connection.execute(query).one_or_none() is not None


def require_version(connection: sa.Connection, prompt: Prompt, version: int) -> None:
    """Raise PromptNotFoundError if a name has no such version."""
    if not has_version(connection, prompt, version):
        raise PromptNotFoundError(f"soft prompt {prompt.name!r} has no version {version}")


def alias_target(connection: sa.Connection, prompt: Prompt, alias: str) -> int | None:
    """The version that an alias points at; None if there is no such alias."""
    query = sa.select(aliases.c.version).where(aliases.c.prompt_id == prompt.id, aliases.c.alias == alias)
    found: int | None = connection.execute(query).scalar_one_or_none()
    return found


def rollout_of(connection: sa.Connection, prompt: Prompt, alias: str) -> Rollout:
    """The rollout of an alias; an empty one if it has none, or there is no such alias."""
    query = sa.select(aliases).where(aliases.c.prompt_id == prompt.id, aliases.c.alias == alias)
    row = connection.execute(query).one_or_none()
    return NO_ROLLOUT if row is None else records.rollout_in(row)


def rollouts_of(connection: sa.Connection, prompt: Prompt) -> dict[str, Rollout]:
    """The aliases of a name that have a rollout, with it."""
    query = sa.select(aliases).where(aliases.c.prompt_id == prompt.id, aliases.c.rollout.is_not(None))
    found = {row.alias: records.rollout_in(row) for row in connection.execute(query.order_by(aliases.c.alias))}
    return {alias: rollout for alias, rollout in found.items() if rollout != NO_ROLLOUT}


_MAX_NAMED = 10


def alias_not_found(connection: sa.Connection, prompt: Prompt, alias: str) -> AliasNotFoundError:
    """The error for an alias that a name does not have; it lists those that it has."""
    query = sa.select(aliases.c.alias, aliases.c.version).where(aliases.c.prompt_id == prompt.id)
    rows = connection.execute(query.order_by(aliases.c.alias).limit(_MAX_NAMED + 1)).all()
    known = ", ".join(f"{row.alias}={row.version}" for row in rows[:_MAX_NAMED])
    if len(rows) > _MAX_NAMED:
        known += ", ..."
    has = f"its aliases are {known}" if rows else "it has none; name a version"
    return AliasNotFoundError(f"soft prompt {prompt.name!r} has no alias {alias!r}: {has}")


def require_target(
    connection: sa.Connection, prompt: Prompt, alias: str, expected: int | None, rollout: Rollout | None = None
) -> None:
    """Raise PromptConflictError unless an alias has the expected version and rollout; None expects nothing."""
    if expected is not None and (found := alias_target(connection, prompt, alias)) != expected:
        raise PromptConflictError(
            f"alias {alias!r} of {prompt.name!r} points at {found or 'nothing'}, not at {expected}"
        )
    if rollout is not None and (now := rollout_of(connection, prompt, alias)) != rollout:
        has = json.dumps(now.to_json()) if now != NO_ROLLOUT else "no rollout"
        raise PromptConflictError(f"alias {alias!r} of {prompt.name!r} has {has}, which is not the expected rollout")


def earlier_versions(connection: sa.Connection, name: str, alias: str) -> list[int]:
    """The earlier versions of an alias, oldest first, without promotions that were rolled back."""
    query = (
        sa.select(history.c.action, history.c.version, history.c.previous_version)
        .where(
            history.c.name == name,
            history.c.action != HistoryAction.ROLLOUT.value,  # it moves no alias
            sa.or_(history.c.alias == alias, history.c.action == HistoryAction.DELETE_PROMPT.value),
        )
        .order_by(history.c.id)
    )
    found: list[int] = []
    removed: dict[int, list[int]] = {}
    """Those of removed aliases, by the version that each pointed at; a restored alias has them again."""
    for action, version, previous in connection.execute(query):
        if action in (HistoryAction.PROMOTE, HistoryAction.IMPORT):
            found.append(version)
        elif action == HistoryAction.ROLLBACK:
            while found and found[-1] != version:
                found.pop()
        elif action == HistoryAction.RESTORE:
            found = list(removed.get(version, [version]))
        else:  # the alias was removed, or the name with all its aliases, which may have entries of their own
            if previous is not None:
                removed[previous] = found
            found = []
    return found[:-1]
