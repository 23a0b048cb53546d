"""Corrections of what is known about a version, and changes of the owner. The bytes of a version never change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from prompt_store.catalog import lookups
from prompt_store.catalog.change import Change
from prompt_store.catalog.schema import history, prompts, tags, versions
from prompt_store.changes import MAX_METADATA_BYTES, HistoryAction, VersionEdit
from prompt_store.types import Access, PromptVersion


def edit_version(
    change: Change, name: str, version: int, edit: VersionEdit, access: Access | None
) -> tuple[PromptVersion, tuple[str, ...]]:
    """Change fields of a version.

    Returns:
        The version, and the names of the fields whose values have changed; none, if all were as given.

    Raises:
        PromptNotFoundError: If there is no such version.
        ValueError: If it has no head, or another number of labels, or its metadata would become too large.
    """
    connection = change.connection
    prompt = lookups.find(connection, name, access, to_change=True)
    before = lookups.version_of(connection, prompt, version)
    new_metadata = _metadata(before, edit)
    details: dict[str, object] = {}
    values: dict[str, object] = {}
    if edit.description is not None and edit.description != before.description:
        details["description"] = {"from": before.description, "to": edit.description}
        values["description"] = edit.description
    if edit.lineage is not None and edit.lineage != before.lineage:
        details["lineage"] = {"from": before.lineage.to_json(), "to": edit.lineage.to_json()}
        values["lineage"] = json.dumps(edit.lineage.to_json(), allow_nan=False)
    if edit.format is not None and edit.format != before.format:
        old = None if before.format is None else before.format.to_json()
        details["format"] = {"from": old, "to": edit.format.to_json()}
        values["format"] = json.dumps(edit.format.to_json(), allow_nan=False)
    if new_metadata != before.metadata:
        details["metadata"] = _difference(before.metadata, new_metadata)
        values["metadata"] = json.dumps(new_metadata, allow_nan=False)
        if len(str(values["metadata"])) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata: would exceed the limit of {MAX_METADATA_BYTES} bytes")
    mine = sa.and_(versions.c.prompt_id == prompt.id, versions.c.version == version)
    if values:
        connection.execute(versions.update().where(mine).values(values))
    new_tags = before.tags if edit.tags is None else tuple(sorted(set(edit.tags)))
    if new_tags != before.tags:
        details["tags"] = {"from": list(before.tags), "to": list(new_tags)}
        version_id = connection.execute(sa.select(versions.c.id).where(mine)).scalar_one()
        _replace_tags(connection, version_id, name, new_tags)
    if details:
        change.add_entry(name, HistoryAction.EDIT, version=version, details=details)
    return lookups.version_of(connection, prompt, version), tuple(details)


def change_owner(change: Change, name: str, owner: str, access: Access | None) -> None:
    """Give a soft prompt with all its versions and its history to another tenant.

    Raises:
        PromptNotFoundError: If there is no such name.
    """
    connection = change.connection
    prompt = lookups.find(connection, name, access, to_change=True)
    if prompt.owner == owner:
        return
    connection.execute(prompts.update().where(prompts.c.id == prompt.id).values(owner=owner))
    connection.execute(history.update().where(history.c.name == name).values(owner=owner))
    change.add_entry(name, HistoryAction.CHANGE_OWNER, details={"from": prompt.owner, "to": owner})


def _metadata(before: PromptVersion, edit: VersionEdit) -> dict[str, object]:
    """The metadata after an edit."""
    merged = {**before.metadata, **(edit.metadata or {})}
    found = {key: value for key, value in merged.items() if value is not None or key not in (edit.metadata or {})}
    if edit.labels is not None:
        if before.num_labels is None:
            raise ValueError(f"labels: {before.name}@{before.version} has no classification head")
        if len(edit.labels) != before.num_labels:
            raise ValueError(f"labels: the head has {before.num_labels} labels, not {len(edit.labels)}")
        if len(set(edit.labels)) != len(edit.labels) or not all(edit.labels):
            raise ValueError("labels: must be different, and not empty")
        found["labels"] = list(edit.labels)
    return found


def _difference(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, object]:
    """The old and the new values of the keys that differ."""
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return {"from": {key: before[key] for key in keys if key in before}, "to": {key: after.get(key) for key in keys}}


def _replace_tags(connection: sa.Connection, version_id: int, name: str, new_tags: Sequence[str]) -> None:
    connection.execute(tags.delete().where(tags.c.version_id == version_id))
    if new_tags:
        rows = [{"version_id": version_id, "tag": tag, "name": name} for tag in new_tags]
        connection.execute(tags.insert(), rows)
