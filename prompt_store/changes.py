"""Changes of names: who made them, why, and what they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from prompt_store.formats import PromptFormat
from prompt_store.types import Lineage

MAX_REASON_CHARS = 1024
MAX_METADATA_BYTES = 64 * 1024
"""Maximum size of a version's metadata as JSON, that of a field of an upload."""


class HistoryAction(StrEnum):
    """The kinds of changes of a name."""

    PUBLISH = "publish"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    ROLLOUT = "rollout"
    """The shares of an alias's canaries were changed, or its shadow."""
    EDIT = "edit"
    DELETE_ALIAS = "delete_alias"
    DELETE_VERSION = "delete_version"
    DELETE_PROMPT = "delete_prompt"
    RESTORE = "restore"
    IMPORT = "import"
    CHANGE_OWNER = "change_owner"
    READ_ACROSS_TENANTS = "read_across_tenants"
    """An administrator has listed or read what belongs to another tenant; no change, but recorded like one."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a change, and why.

    Attributes:
        id: The API key in records, which does not reveal it; None without keys.
        name: The name that the key file gives the key.
        reason: The reason that was given for the change.
    """

    id: str | None = None
    name: str | None = None
    reason: str | None = None

    @classmethod
    def of(cls, actor: Actor | str | None) -> Actor:
        """An actor; a text is its id."""
        return actor if isinstance(actor, Actor) else cls(actor)


By = Actor | str | None
"""Who makes a change; a text is the id of the actor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One change of one name.

    Attributes:
        id: Grows with every change of the catalog; the cursor of pages.
        name: The soft prompt; empty if the entry is about no single one.
        action: The kind of change.
        alias: The alias that was moved or removed, if any.
        version: The version that was published, edited, deleted or restored, or the new target of the alias.
        previous_version: The previous target of the alias, or None.
        actor: The API key that made the change, if known.
        actor_name: The name of this key at that time, if it had one.
        reason: The reason that was given, if any.
        details: For an edit, ``from`` and ``to`` of every changed field; for a rollout, the rollout ``from`` and
            ``to``; otherwise empty.
        is_imported: Whether the change was made in another store, whose history was imported.
        at: Time of the change, UTC.
    """

    id: int
    name: str
    action: HistoryAction
    alias: str | None
    version: int | None
    previous_version: int | None
    actor: str | None
    actor_name: str | None
    reason: str | None
    details: Mapping[str, object]
    is_imported: bool
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryFilter:
    """Which entries of the history of all names are asked for; None does not filter.

    Attributes:
        name: The soft prompt.
        actor: The id or the name of an API key.
        action: The kind of change.
        since: The earliest time, in microseconds since 1970, UTC.
        until: The time before which the changes were made, in the same unit.
    """

    name: str | None = None
    actor: str | None = None
    action: HistoryAction | None = None
    since: int | None = None
    until: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedEntry:
    """A change that was made in another store.

    Attributes:
        at: Time of the change, in microseconds since 1970, UTC.

    All other attributes have the same meaning as in ``HistoryEntry``.
    """

    action: HistoryAction
    alias: str | None = None
    version: int | None = None
    previous_version: int | None = None
    actor: str | None = None
    actor_name: str | None = None
    reason: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    at: int


@dataclass(frozen=True, slots=True)
class ImportedVersion:
    """What a version was in another store.

    Attributes:
        version: Its number.
        created_at: Time of its publication, in microseconds since 1970, UTC.
        created_by: Who published it, if known.
    """

    version: int
    created_at: int
    created_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionEdit:
    """New values of what can be corrected in a version; None leaves a field as it is.

    Attributes:
        description: Free text.
        tags: All tags.
        metadata: Keys to set in the metadata; None removes a key.
        labels: Names of the labels of the head, in order.
        lineage: Origin of the version.
        format: How it wants to be asked.
    """

    description: str | None = None
    tags: tuple[str, ...] | None = None
    metadata: Mapping[str, object] | None = None
    labels: tuple[str, ...] | None = None
    lineage: Lineage | None = None
    format: PromptFormat | None = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a deletion has deleted.

    Attributes:
        versions: The deleted versions.
        aliases: The removed aliases, with the versions that they pointed at.
        at: Time of the deletion, in microseconds since 1970, UTC.
        ended_rollouts: Aliases that remain, and whose rollouts ended because they named a deleted version.
    """

    versions: tuple[int, ...]
    aliases: Mapping[str, int]
    at: int
    ended_rollouts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Restoration:
    """What a restoration has brought back.

    Attributes:
        versions: The restored versions.
        aliases: The restored aliases, with the versions that they point at.
        kept_aliases: Aliases that were deleted too but exist again; they still point at these versions.
    """

    versions: tuple[int, ...]
    aliases: Mapping[str, int]
    kept_aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ImportedHistory:
    """What an import of aliases and history has added.

    Attributes:
        aliases: The created or moved aliases, with the versions that they point at.
        kept_aliases: Aliases that point elsewhere and were not moved, with the versions that they point at.
        missing_aliases: Aliases whose version does not exist here.
        num_entries: Entries of the history that were not known before.
        missing_rollouts: Aliases whose rollout names a version that does not exist here, and was not started.
    """

    aliases: Mapping[str, int]
    kept_aliases: Mapping[str, int]
    missing_aliases: tuple[str, ...]
    num_entries: int
    missing_rollouts: tuple[str, ...] = ()
