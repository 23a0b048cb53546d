"""Deletion and restoration of versions and names.

A deleted version keeps its files, its tags and ``deleted_in``, the revision of its deletion, until it is forgotten.
The aliases that a deletion removes are in the history, with the same revision.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import sqlalchemy as sa

from prompt_store.catalog import lookups
from prompt_store.catalog.change import Change, lock_blobs
from prompt_store.catalog.database import Database
from prompt_store.catalog.lookups import live
from prompt_store.catalog.over import require_adapters_of, require_unused
from prompt_store.catalog.records import Prompt
from prompt_store.catalog.schema import aliases, blobs, history, prompts, tags, version_files, versions
from prompt_store.changes import Deletion, HistoryAction, Restoration
from prompt_store.errors import PromptConflictError, PromptInUseError, PromptNotFoundError
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import Access

_is_kept = versions.c.deleted_in > 0
"""The condition that a version is deleted and not forgotten; unlike IS NOT NULL, SQLite finds it by the index."""


def delete_version(change: Change, name: str, version: int, access: Access | None, *, force: bool) -> Deletion:
    """Delete one version, and the aliases that point at it. No alias moves to another version.

    The rollouts of other aliases that name it end: the versions that those aliases point at answer all requests.

    Raises:
        PromptNotFoundError: If there is no such version.
        PromptInUseError: If soft prompts were trained over it; or aliases point at it, or send requests to it, and
            ``force`` is not set.
    """
    prompt = lookups.find(change.connection, name, access, to_change=True)
    lookups.require_version(change.connection, prompt, version)
    require_unused(change.connection, name, [version])
    pointing = {alias: target for alias, target in pointed_at(change.connection, prompt).items() if target == version}
    if pointing and not force:
        raise PromptInUseError(
            f"version {version} of {name!r} is in use by {_named(pointing)}: move the alias first, or delete both by "
            "force=true (prelude rm --yes)"
        )
    sharing = {
        alias: rollout
        for alias, rollout in lookups.rollouts_of(change.connection, prompt).items()
        if version in rollout.versions and alias not in pointing
    }
    if sharing and not force:
        raise PromptInUseError(
            f"version {version} of {name!r} is in the rollout of {_named(sharing)}: end the rollout first, or delete "
            "the version and end it by force=true (prelude rm --yes)"
        )
    for alias in sharing:
        target = lookups.alias_target(change.connection, prompt, alias)
        if target is not None:
            change.move_alias(prompt, alias, target, HistoryAction.PROMOTE)
    deleted = tombstone(change, prompt, [version], pointing, HistoryAction.DELETE_VERSION, version)
    return replace(deleted, ended_rollouts=tuple(sharing))


def delete_prompt(change: Change, name: str, access: Access | None, *, force: bool) -> Deletion:
    """Delete all versions and aliases of a name.

    Raises:
        PromptNotFoundError: If there is no such name.
        PromptInUseError: If soft prompts of other names were trained over a version, or there is more than one and
            ``force`` is not set.
    """
    prompt = lookups.find(change.connection, name, access, to_change=True)
    query = sa.select(versions.c.version).where(versions.c.prompt_id == prompt.id, live).order_by(versions.c.version)
    numbers = list(change.connection.execute(query).scalars())
    require_unused(change.connection, name, numbers)
    pointing = pointed_at(change.connection, prompt)
    if len(numbers) > 1 and not force:
        also = f" and {_named(pointing)}" if pointing else ""
        raise PromptInUseError(
            f"soft prompt {name!r} has {len(numbers)} versions{also}: delete one version, or all of it by force=true "
            "(prelude rm --yes)"
        )
    return tombstone(change, prompt, numbers, pointing, HistoryAction.DELETE_PROMPT, None)


def restore(
    change: Change, name: str, version: int | None, access: Access | None, *, deleted_after: int
) -> Restoration:
    """Bring back what the last deletion of a name has deleted, or one version, with its aliases.

    An alias that was created again meanwhile stays where it is.

    Args:
        change: The transaction.
        name: The soft prompt.
        version: One version; None for everything that the last deletion has deleted.
        access: What the caller may see and change.
        deleted_after: The time before which deletions are final (microseconds, UTC).

    Raises:
        PromptNotFoundError: If nothing was deleted, or it cannot be restored any more.
        PromptConflictError: If the version is not deleted, or the adapter that it was trained over is.
    """
    connection = change.connection
    prompt = lookups.find_known(connection, name, access, to_change=True)
    mine = versions.c.prompt_id == prompt.id
    if version is not None:
        _check_restorable(change, prompt, version, deleted_after)
        which = versions.c.version == version
    else:
        last = connection.execute(
            sa.select(sa.func.max(versions.c.deleted_in)).where(mine, versions.c.deleted_at > deleted_after, _is_kept)
        ).scalar_one()
        if last is None:
            raise PromptNotFoundError(f"soft prompt {name!r} has no deleted version that can be restored")
        which = versions.c.deleted_in == last
    found = connection.execute(
        sa.select(versions.c.version, versions.c.deleted_in).where(mine, which).order_by(versions.c.version)
    ).all()
    numbers = [row.version for row in found]
    require_adapters_of(connection, prompt.id, numbers)
    connection.execute(versions.update().where(mine, which).values(deleted_at=None, deleted_in=None))
    _count(change, prompt, len(numbers))
    for number in numbers:
        change.add_entry(name, HistoryAction.RESTORE, version=number)
    restored, kept = _restore_aliases(change, prompt, found[0].deleted_in, set(numbers))
    return Restoration(tuple(numbers), restored, kept)


def has_forgettable(database: Database, before: int) -> bool:
    """Whether there is a deleted version to forget; without a lock, because there rarely is."""
    with database.reading() as connection:
        return connection.execute(_forgettable(before).limit(1)).first() is not None


def forget(change: Change, before: int) -> None:
    """Drop files and tags of versions deleted at this time (microseconds, UTC) or before.

    Blobs that lose their last name become garbage.
    """
    connection = change.connection
    while ids := list(connection.execute(_forgettable(before).limit(_BATCH)).scalars()):
        files = version_files.c.version_id.in_(ids)
        digests = set(connection.execute(sa.select(version_files.c.sha256).where(files)).scalars())
        lock_blobs(connection, digests)
        connection.execute(version_files.delete().where(files))
        connection.execute(tags.delete().where(tags.c.version_id.in_(ids)))
        connection.execute(versions.update().where(versions.c.id.in_(ids)).values(deleted_in=None))
        named = sa.exists().where(version_files.c.sha256 == blobs.c.sha256)
        connection.execute(blobs.update().where(blobs.c.sha256.in_(digests), ~named).values(unnamed_since=change.at))


_BATCH = 500


def _forgettable(before: int) -> sa.Select[tuple[int]]:
    return sa.select(versions.c.id).where(_is_kept, versions.c.deleted_at <= before)


def tombstone(
    change: Change,
    prompt: Prompt,
    numbers: Sequence[int],
    pointing: dict[str, int],
    action: HistoryAction,
    version: int | None,
) -> Deletion:
    """Make versions tombstones and remove aliases; the entry of the deletion follows those of the aliases."""
    change.connection.execute(
        versions.update()
        .where(
            versions.c.prompt_id == prompt.id, live, sa.true() if version is None else versions.c.version == version
        )
        .values(deleted_at=change.at, deleted_in=change.revision)
    )
    _count(change, prompt, -len(numbers))
    for alias, target in pointing.items():
        change.remove_alias(prompt, alias, target)
    change.add_entry(prompt.name, action, version=version)
    return Deletion(tuple(numbers), pointing, change.at)


def _restore_aliases(
    change: Change, prompt: Prompt, revision: int, numbers: Collection[int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Restore the aliases that a deletion removed; returns them, and those that exist again with their versions."""
    removed = (
        sa.select(history.c.alias, history.c.previous_version)
        .where(
            history.c.name == prompt.name,
            history.c.revision == revision,
            history.c.action == HistoryAction.DELETE_ALIAS.value,
        )
        .order_by(history.c.alias)
    )
    current = pointed_at(change.connection, prompt)
    restored, kept = {}, {}
    for alias, target in change.connection.execute(removed).all():
        if target not in numbers:
            continue
        if alias in current:
            kept[alias] = current[alias]
        else:
            rollout = _ended_rollout(change, prompt, alias, revision)
            change.move_alias(prompt, alias, target, HistoryAction.RESTORE, rollout)
            restored[alias] = target
    return restored, kept


def _ended_rollout(change: Change, prompt: Prompt, alias: str, revision: int) -> Rollout:
    """The rollout of an alias that a deletion removed; an empty one if it had none, or a version is not there."""
    ended = sa.select(history.c.details).where(
        history.c.name == prompt.name,
        history.c.revision == revision,
        history.c.action == HistoryAction.ROLLOUT.value,
        history.c.alias == alias,
    )
    details = change.connection.execute(ended).scalar_one_or_none()
    if details is None:
        return NO_ROLLOUT
    rollout = Rollout.parse(json.loads(details)["from"])
    is_whole = all(lookups.has_version(change.connection, prompt, version) for version in rollout.versions)
    return rollout if is_whole else NO_ROLLOUT


def _check_restorable(change: Change, prompt: Prompt, version: int, deleted_after: int) -> None:
    query = sa.select(versions.c.deleted_at, versions.c.deleted_in).where(
        versions.c.prompt_id == prompt.id, versions.c.version == version
    )
    row = change.connection.execute(query).one_or_none()
    if row is None:
        raise PromptNotFoundError(f"soft prompt {prompt.name!r} never had a version {version}")
    if row.deleted_at is None:
        raise PromptConflictError(f"version {version} of {prompt.name!r} is not deleted")
    if row.deleted_at <= deleted_after or row.deleted_in is None:
        when = datetime.fromtimestamp(row.deleted_at / 1e6, UTC)
        raise PromptNotFoundError(
            f"version {version} of {prompt.name!r} was deleted at {when:%Y-%m-%d %H:%M}Z: too late to restore it"
        )


def pointed_at(connection: sa.Connection, prompt: Prompt) -> dict[str, int]:
    """The aliases of a name, with the versions that they point at."""
    query = sa.select(aliases.c.alias, aliases.c.version).where(aliases.c.prompt_id == prompt.id)
    return {row.alias: row.version for row in connection.execute(query.order_by(aliases.c.alias))}


def _count(change: Change, prompt: Prompt, more: int) -> None:
    change.connection.execute(
        prompts.update().where(prompts.c.id == prompt.id).values(num_versions=prompts.c.num_versions + more)
    )


def _named(pointing: Collection[str]) -> str:
    return f"the alias{'es' if len(pointing) > 1 else ''} {', '.join(pointing)}"
