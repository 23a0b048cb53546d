"""Versions, aliases and history that come from another store, with their numbers and times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from prompt_store.catalog import deletion, lookups, records
from prompt_store.catalog.change import Change
from prompt_store.catalog.records import NewVersion, Prompt
from prompt_store.catalog.schema import history, prompts, versions
from prompt_store.changes import HistoryAction, ImportedEntry, ImportedHistory, ImportedVersion
from prompt_store.errors import PromptConflictError, PromptNotFoundError
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import Access, PromptVersion

_SECOND = 1_000_000


def import_version(change: Change, new: NewVersion, imported: ImportedVersion) -> tuple[PromptVersion, bool]:
    """Record a version under the number that it has in another store; its blobs are stored.

    Args:
        change: The transaction.
        new: The version.
        imported: Its number, time and publisher there.

    Returns:
        The version, and whether it is new.

    Raises:
        PromptConflictError: If the name belongs, or belonged, to another owner; or if the number has other bytes, or
            was deleted.
    """
    connection, version = change.connection, imported.version
    prompt = lookups.publishable_prompt(connection, new.name, new.owner)
    if prompt is None:
        values = {"name": new.name, "owner": new.owner, "last_version": 0, "num_versions": 0}
        prompt = Prompt(records.insert(connection, prompts, values), new.name, 0, new.owner)
    query = sa.select(versions.c.digest, versions.c.over, versions.c.deleted_at).where(
        versions.c.prompt_id == prompt.id, versions.c.version == version
    )
    row = connection.execute(query).one_or_none()
    if row is not None:
        if row.deleted_at is not None:
            raise PromptConflictError(
                f"version {version} of {new.name!r} was deleted here, and numbers are not reused: restore it"
            )
        if (row.digest, row.over) != (new.digest, new.over):
            raise PromptConflictError(f"version {version} of {new.name!r} exists here with other bytes")
        return lookups.version_of(connection, prompt, version), False
    records.record(
        connection, prompt.id, version, new, created_at=imported.created_at, created_by=imported.created_by
    )
    connection.execute(
        prompts.update()
        .where(prompts.c.id == prompt.id)
        .values(last_version=max(version, prompt.last_version), num_versions=prompts.c.num_versions + 1)
    )
    change.add_entry(new.name, HistoryAction.IMPORT, version=version)
    return lookups.version_of(connection, prompt, version), True


def import_history(
    change: Change,
    name: str,
    entries: Sequence[ImportedEntry],
    aliases: Mapping[str, int],
    access: Access | None,
    *,
    move_aliases: bool,
    rollouts: Mapping[str, Rollout] | None = None,
) -> ImportedHistory:
    """Add entries of another store's history that are not known yet, and the aliases.

    The same entries again change nothing: they are compared by content and by time in seconds.

    Args:
        change: The transaction.
        name: A soft prompt with versions.
        entries: The entries, oldest first.
        aliases: The versions by alias.
        access: What the caller may see and change.
        move_aliases: Whether to move aliases that point elsewhere, and to start rollouts of those that do not.
        rollouts: The rollouts by alias; one starts only if its alias is created or moved, or ``move_aliases``.

    Raises:
        PromptNotFoundError: If there is no such name.
        ValueError: If a rollout names the version that its alias points at.
    """
    connection = change.connection
    prompt = lookups.find_known(connection, name, access, to_change=True)
    if prompt.last_version == 0:
        raise PromptNotFoundError(f"soft prompt {name!r} does not exist")
    num_entries = _add_entries(change, prompt, entries)
    last = max((entry.version or 0 for entry in entries), default=0)
    if last > prompt.last_version:  # a number that was used there, and deleted, is not used here either
        connection.execute(prompts.update().where(prompts.c.id == prompt.id).values(last_version=last))
    current = deletion.pointed_at(connection, prompt)
    created, kept, missing, missing_rollouts = {}, {}, [], []
    for alias, version in sorted(aliases.items()):
        rollout = (rollouts or {}).get(alias, NO_ROLLOUT)
        rollout.check(version)
        if current.get(alias) == version and (not move_aliases or rollout == NO_ROLLOUT):
            continue
        if not lookups.has_version(connection, prompt, version):
            missing.append(alias)
        elif alias in current and not move_aliases:
            kept[alias] = current[alias]
        else:
            if not all(lookups.has_version(connection, prompt, number) for number in rollout.versions):
                missing_rollouts.append(alias)
                rollout = NO_ROLLOUT
            change.move_alias(prompt, alias, version, HistoryAction.IMPORT, rollout)
            if current.get(alias) != version:
                created[alias] = version
    return ImportedHistory(created, kept, tuple(missing), num_entries, tuple(missing_rollouts))


def _add_entries(change: Change, prompt: Prompt, entries: Sequence[ImportedEntry]) -> int:
    """Insert the entries that are not known; returns their number."""
    if not entries:
        return 0
    columns = (
        history.c.action,
        history.c.alias,
        history.c.version,
        history.c.previous_version,
        history.c.actor,
        history.c.at,
    )
    since, until = min(entry.at for entry in entries), max(entry.at for entry in entries)
    query = sa.select(*columns).where(
        history.c.name == prompt.name, history.c.at >= since - _SECOND, history.c.at <= until + _SECOND
    )
    known = Counter((*row[:-1], row.at // _SECOND) for row in change.connection.execute(query))
    added = 0
    for entry in entries:
        key = (
            entry.action.value,
            entry.alias,
            entry.version,
            entry.previous_version,
            entry.actor,
            entry.at // _SECOND,
        )
        if known[key] > 0:
            known[key] -= 1
            continue
        change.add_imported(prompt, entry)
        added += 1
    return added
