"""Conversion between rows of the tables and the types of the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from prompt_store.catalog.schema import aliases, blobs, prompts, tags, version_files, versions
from prompt_store.changes import HistoryAction, HistoryEntry
from prompt_store.formats import PromptFormat
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import (
    DEFAULT_ALIAS,
    SHARED,
    Lineage,
    PeftType,
    PromptKind,
    PromptSummary,
    PromptVersion,
    StoredFile,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of ``prompts``."""

    id: int
    name: str
    last_version: int
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """A version to be published; the catalog adds number and time.

    Attributes have the same meaning as in ``PromptVersion``.
    """

    name: str
    digest: str
    peft_type: PeftType
    task_type: str
    num_virtual_tokens: int
    dtype: str
    base_model_name_or_path: str | None
    files: tuple[StoredFile, ...]
    num_tasks: int | None = None
    num_labels: int | None = None
    kind: PromptKind = PromptKind.SOFT_PROMPT
    rank: int | None = None
    num_modules: int | None = None
    num_parameters: int | None = None
    targets: tuple[str, ...] = ()
    over: str | None = None
    description: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    format: PromptFormat | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    owner: str = SHARED


def record(
    connection: sa.Connection,
    prompt_id: int,
    version: int,
    new: NewVersion,
    *,
    created_at: int,
    created_by: str | None,
) -> None:
    """Insert a version with its files and tags."""
    values = {
        "prompt_id": prompt_id,
        "version": version,
        "digest": new.digest,
        "peft_type": new.peft_type.value,
        "task_type": new.task_type,
        "num_virtual_tokens": new.num_virtual_tokens,
        "num_tasks": new.num_tasks,
        "num_labels": new.num_labels,
        "kind": new.kind.value,
        "rank": new.rank,
        "num_modules": new.num_modules,
        "num_parameters": new.num_parameters,
        "targets": json.dumps(list(new.targets)),
        "over": new.over,
        "dtype": new.dtype,
        "base_model_name_or_path": new.base_model_name_or_path,
        "description": new.description,
        "metadata": json.dumps(dict(new.metadata), allow_nan=False),
        "lineage": json.dumps(new.lineage.to_json(), allow_nan=False),
        "format": None if new.format is None else json.dumps(new.format.to_json(), allow_nan=False),
        "overrides": json.dumps(dict(new.overrides), allow_nan=False),
        "created_at": created_at,
        "created_by": created_by,
    }
    version_id = insert(connection, versions, values)
    files = [{"version_id": version_id, "filename": file.filename, "sha256": file.sha256} for file in new.files]
    connection.execute(version_files.insert(), files)
    if new.tags:
        words = [{"version_id": version_id, "tag": tag, "name": new.name} for tag in sorted(set(new.tags))]
        connection.execute(tags.insert(), words)


def insert(connection: sa.Connection, table: sa.Table, values: Mapping[str, object]) -> int:
    """Insert a row; returns its id."""
    row_id: int = connection.execute(table.insert().values(values).returning(table.c.id)).scalar_one()
    return row_id


def versions_of(
    connection: sa.Connection, rows: Sequence[sa.Row[Any]], of: Mapping[int, Prompt]
) -> list[PromptVersion]:
    """Rows of ``versions`` with their files and tags, in the order of the rows.

    Args:
        connection: Used to read files and tags.
        rows: Complete rows.
        of: The soft prompts by ``prompt_id``.
    """
    ids = [row.id for row in rows]
    files: dict[int, list[StoredFile]] = {row_id: [] for row_id in ids}
    words: dict[int, list[str]] = {row_id: [] for row_id in ids}
    found = connection.execute(
        sa.select(version_files, blobs.c.size)
        .join(blobs, blobs.c.sha256 == version_files.c.sha256)
        .where(version_files.c.version_id.in_(ids))
        .order_by(version_files.c.filename)
    )
    for file in found:
        files[file.version_id].append(StoredFile(file.filename, file.sha256, file.size))
    for tag in connection.execute(sa.select(tags).where(tags.c.version_id.in_(ids)).order_by(tags.c.tag)):
        words[tag.version_id].append(tag.tag)
    return [_version(row, of[row.prompt_id], files[row.id], words[row.id]) for row in rows]


def summaries(connection: sa.Connection, prompt_ids: Sequence[int]) -> list[PromptSummary]:
    """Soft prompts with aliases and newest versions, in the order of the ids, by four queries."""
    prompt_rows = {row.id: row for row in connection.execute(sa.select(prompts).where(prompts.c.id.in_(prompt_ids)))}
    of = {row.id: Prompt(row.id, row.name, row.last_version, row.owner) for row in prompt_rows.values()}
    pointed: dict[int, dict[str, int]] = {prompt_id: {} for prompt_id in prompt_ids}
    rollouts: dict[int, dict[str, Rollout]] = {prompt_id: {} for prompt_id in prompt_ids}
    query = sa.select(aliases).where(aliases.c.prompt_id.in_(prompt_ids)).order_by(aliases.c.alias)
    for alias in connection.execute(query):
        pointed[alias.prompt_id][alias.alias] = alias.version
        rollout = rollout_in(alias)
        if rollout != NO_ROLLOUT:
            rollouts[alias.prompt_id][alias.alias] = rollout
    highest = (
        sa.select(versions.c.prompt_id, sa.func.max(versions.c.version).label("version"))
        .where(versions.c.prompt_id.in_(prompt_ids), versions.c.deleted_at.is_(None))
        .group_by(versions.c.prompt_id)
        .subquery()
    )
    latest = sa.and_(aliases.c.prompt_id == highest.c.prompt_id, aliases.c.alias == DEFAULT_ALIAS)
    wanted = sa.func.coalesce(aliases.c.version, highest.c.version)
    rows = connection.execute(
        sa.select(versions)
        .select_from(highest)
        .outerjoin(aliases, latest)
        .join(versions, sa.and_(versions.c.prompt_id == highest.c.prompt_id, versions.c.version == wanted))
    ).all()
    found = {row.prompt_id: version for row, version in zip(rows, versions_of(connection, rows, of), strict=True)}
    return [
        PromptSummary(of[key].name, pointed[key], found[key], prompt_rows[key].num_versions, rollouts[key])
        for key in prompt_ids
    ]


def rollout_in(row: sa.Row[Any]) -> Rollout:
    """The rollout in a row of ``aliases``; an empty one if there is none, or the alias has moved without it."""
    stored = json.loads(row.rollout or "{}")
    return Rollout.parse(stored["rollout"]) if stored.get("of") == row.version else NO_ROLLOUT


def rollout_value(version: int, rollout: Rollout) -> str | None:
    """A rollout as a row of ``aliases`` has it, for an alias that points at a version."""
    return None if rollout == NO_ROLLOUT else json.dumps({"of": version, "rollout": rollout.to_json()})


def history_entry(row: sa.Row[Any]) -> HistoryEntry:
    """Convert a row of ``history``."""
    return HistoryEntry(
        id=row.id,
        name=row.name,
        action=HistoryAction(row.action),
        alias=row.alias,
        version=row.version,
        previous_version=row.previous_version,
        actor=row.actor,
        actor_name=row.actor_name,
        reason=row.reason,
        details=json.loads(row.details or "{}"),
        is_imported=row.imported,
        at=_datetime(row.at),
    )


def _version(row: sa.Row[Any], prompt: Prompt, files: Sequence[StoredFile], words: Sequence[str]) -> PromptVersion:
    return PromptVersion(
        name=prompt.name,
        owner=prompt.owner,
        version=row.version,
        digest=row.digest,
        peft_type=PeftType(row.peft_type),
        task_type=row.task_type,
        num_virtual_tokens=row.num_virtual_tokens,
        dtype=row.dtype,
        base_model_name_or_path=row.base_model_name_or_path,
        files=tuple(files),
        created_at=_datetime(row.created_at),
        description=row.description,
        tags=tuple(words),
        metadata=json.loads(row.metadata),
        lineage=Lineage.parse(json.loads(row.lineage)),
        format=None if row.format is None else PromptFormat.parse(json.loads(row.format)),
        overrides=json.loads(row.overrides),
        created_by=row.created_by,
        num_tasks=row.num_tasks,
        num_labels=row.num_labels,
        kind=PromptKind(row.kind),
        rank=row.rank,
        num_modules=row.num_modules,
        num_parameters=row.num_parameters,
        targets=tuple(json.loads(row.targets)),
        over=row.over,
    )


def _datetime(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
