"""Request and response bodies of the soft prompt routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from prompt_store.types import (
    SHARED,
    Deletion,
    HistoryEntry,
    PromptSummary,
    PromptVersion,
    Restoration,
    check_name,
)
from server.api.request_body import RequestBody

ObjectType = Annotated[str, Field(description="Type of the object.")]
PromptName = Annotated[str, Field(description="The soft prompt's name.")]
HasMore = Annotated[bool, Field(description="Whether there is another page.")]
ExpectedVersion = Annotated[
    int | None, Field(ge=1, lt=2**63, description="Fail with 409 unless the alias points at this version.")
]


class FileBody(BaseModel):
    """A stored file; ``size`` is in bytes."""

    filename: str = Field(description="Name of the file.")
    sha256: str = Field(description="SHA-256 digest of the file, in hexadecimal.")
    size: int = Field(description="Size in bytes.")


class VersionBody(BaseModel):
    """An immutable version of a soft prompt."""

    object: ObjectType = "prompt.version"
    id: PromptName
    version: int = Field(description="Version number, from 1.")
    digest: str = Field(description="SHA-256 over the version's files.")
    peft_type: str = Field(description="PEFT method that trained the soft prompt.")
    task_type: str = Field(description="`CAUSAL_LM` or `SEQ_CLS`.")
    num_virtual_tokens: int = Field(description="Number of positions that the soft prompt takes before the text.")
    dtype: str = Field(description="Element type of the rows, as named by safetensors.")
    base_model_name_or_path: str | None = Field(
        description="The base model named in the configuration of the soft prompt."
    )
    files: list[FileBody] = Field(description="The stored files.")
    size: int = Field(description="Total size of the files, in bytes.")
    created_at: int = Field(description="Unix time in seconds.")
    description: str = Field(description="Free text.")
    tags: list[str] = Field(description="Tags to filter by.")
    metadata: dict[str, Any] = Field(description="JSON object of the uploader.")
    lineage: dict[str, Any] = Field(description="Known values of training_run, parent, dataset_digest and scores.")
    overrides: dict[str, Any] = Field(
        description="Overrides given at upload: allow_other_base (true) if the files name another base model, "
        "task_type if they name none."
    )
    created_by: str | None = Field(description="API key that published the version.")
    num_tasks: int | None = Field(description="Number of tasks of a multitask prompt.")
    num_labels: int | None = Field(description="Number of labels of the classification head.")
    shared: bool = Field(description="Whether it is shared with all tenants.")
    pinned: bool = Field(description="Whether it is pinned on this server.")

    @classmethod
    def of(cls, version: PromptVersion, *, pinned: bool) -> VersionBody:
        """Convert the catalog's record."""
        return cls(
            id=version.name,
            version=version.version,
            digest=version.digest,
            peft_type=version.peft_type.value,
            task_type=version.task_type,
            num_virtual_tokens=version.num_virtual_tokens,
            dtype=version.dtype,
            base_model_name_or_path=version.base_model_name_or_path,
            files=[FileBody(filename=file.filename, sha256=file.sha256, size=file.size) for file in version.files],
            size=version.size,
            created_at=int(version.created_at.timestamp()),
            description=version.description,
            tags=list(version.tags),
            metadata=dict(version.metadata),
            lineage=version.lineage.to_json(),
            overrides=dict(version.overrides),
            created_by=version.created_by,
            shared=version.owner == SHARED,
            num_tasks=version.num_tasks,
            num_labels=version.num_labels,
            pinned=pinned,
        )


class PromptBody(BaseModel):
    """A soft prompt with its aliases and its latest version."""

    object: ObjectType = "prompt"
    id: PromptName
    aliases: dict[str, int] = Field(description="Version numbers by alias.")
    num_versions: int = Field(description="Number of versions.")
    pinned: list[int] = Field(description="Versions pinned on this server.")
    latest: VersionBody = Field(
        description="The version that the alias `latest` points at; without this alias, the highest one."
    )

    @classmethod
    def of(cls, summary: PromptSummary, *, pinned: list[int]) -> PromptBody:
        """Convert the catalog's summary."""
        return cls(
            id=summary.name,
            aliases=dict(summary.aliases),
            num_versions=summary.num_versions,
            pinned=pinned,
            latest=VersionBody.of(summary.latest, pinned=summary.latest.version in pinned),
        )


class PromptList(BaseModel):
    """A page of soft prompts by name; ``last_id`` is the next page's ``after``."""

    object: ObjectType = "list"
    data: list[PromptBody] = Field(description="The soft prompts, by name.")
    has_more: HasMore
    last_id: str | None = Field(description="Value of `after` that fetches the next page.")


class VersionList(BaseModel):
    """A page of a soft prompt's versions, newest first; ``last_id`` is the next page's ``before``."""

    object: ObjectType = "list"
    data: list[VersionBody] = Field(description="The versions, newest first.")
    has_more: HasMore
    last_id: int | None = Field(description="Value of `before` that fetches the next page.")


class HistoryBody(BaseModel):
    """One change of a soft prompt."""

    object: ObjectType = "prompt.change"
    id: int = Field(description="Identifier of the change.")
    action: str = Field(
        description="publish, promote, rollback, delete_alias, delete_version, delete_prompt or restore; a change of "
        "several versions or aliases adds an entry for each: an upload adds a publish and a promote."
    )
    alias: str | None = Field(description="The alias that was moved or deleted.")
    version: int | None = Field(
        description="The version that was published, deleted or restored, or that the alias points at now."
    )
    previous_version: int | None = Field(description="The version that the alias pointed at before.")
    actor: str | None = Field(description="API key that made the change.")
    created_at: int = Field(description="Unix time in seconds.")

    @classmethod
    def of(cls, entry: HistoryEntry) -> HistoryBody:
        """Convert the catalog's record."""
        return cls(
            id=entry.id,
            action=entry.action.value,
            alias=entry.alias,
            version=entry.version,
            previous_version=entry.previous_version,
            actor=entry.actor,
            created_at=int(entry.at.timestamp()),
        )


class HistoryList(BaseModel):
    """A page of a soft prompt's history, newest first; ``last_id`` is the next page's ``before``."""

    object: ObjectType = "list"
    data: list[HistoryBody] = Field(description="The changes, newest first.")
    has_more: HasMore
    last_id: int | None = Field(description="Value of `before` that fetches the next page.")


class AliasBody(RequestBody):
    """The version that an alias should point at."""

    version: int = Field(ge=1, lt=2**63, description="The version that the alias should point at.")
    expected_version: ExpectedVersion = None


class RollbackBody(RequestBody):
    """The condition of a rollback."""

    expected_version: ExpectedVersion = None


class WarmBody(RequestBody):
    """The version to load onto the device; default: the alias latest."""

    version: int | None = Field(None, ge=1, lt=2**63, description="Version number; not with `alias`.")
    alias: Annotated[str, AfterValidator(lambda text: check_name(text, "alias"))] | None = Field(
        None, description="An alias; default: `latest`."
    )
    task_id: int | None = Field(
        None, ge=0, lt=2**63, description="Task id of a multitask prompt; default: all tasks."
    )
    pin: bool | None = Field(
        None,
        description="true: keep the files on local disk and the rows in host memory until unpinned, deleted or "
        "restarted; a pin by alias (default: latest) follows the alias. false: release the pin and load "
        "nothing.",
    )


class WarmReply(BaseModel):
    """The version that was loaded onto the device or unpinned."""

    object: ObjectType = "prompt.warmed"
    id: PromptName
    version: int = Field(description="The version that was loaded or unpinned.")
    task_ids: list[int] | None = Field(description="Task ids of a multitask prompt.")
    pinned: bool = Field(description="Whether it is pinned on this server.")
    seconds: float = Field(description="Duration in seconds; 0 if a pin was released.")


class AliasReply(BaseModel):
    """The version that an alias points at."""

    object: ObjectType = "prompt.alias"
    id: PromptName
    alias: str = Field(description="The alias.")
    version: int = Field(description="The version that the alias points at now.")


class Deleted(BaseModel):
    """The deleted object."""

    id: str = Field(description="Name of the deleted object: NAME, NAME@VERSION or NAME@ALIAS.")
    object: ObjectType
    deleted: Annotated[bool, Field(description="Always true.")] = True


class DeletedVersions(Deleted):
    """A deleted version, or a deleted soft prompt with all its versions."""

    versions: list[int] = Field(description="The deleted versions.")
    aliases: dict[str, int] = Field(description="The removed aliases, with the versions that they pointed at.")
    restorable_until: int | None = Field(
        description="Unix time in seconds until which it can be restored; null if the deletion is final."
    )

    @classmethod
    def of(cls, name: str, deletion: Deletion, *, object_: str, until: float | None) -> DeletedVersions:
        """Convert the catalog's record."""
        return cls(
            id=name,
            object=object_,
            versions=list(deletion.versions),
            aliases=dict(deletion.aliases),
            restorable_until=None if until is None else int(until),
        )


class RestoreBody(RequestBody):
    """The version to restore; default: all that the last deletion has deleted."""

    version: int | None = Field(
        None, ge=1, lt=2**63, description="Version number; default: all versions of the last deletion."
    )


class Restored(BaseModel):
    """The restored versions and aliases."""

    object: ObjectType = "prompt.restored"
    id: PromptName
    versions: list[int] = Field(description="The restored versions.")
    aliases: dict[str, int] = Field(description="The restored aliases, with the versions that they point at.")
    kept_aliases: dict[str, int] = Field(
        description="Aliases that were deleted too but exist again, and so were not moved, with their versions."
    )

    @classmethod
    def of(cls, name: str, restoration: Restoration) -> Restored:
        """Convert the catalog's record."""
        return cls(
            id=name,
            versions=list(restoration.versions),
            aliases=dict(restoration.aliases),
            kept_aliases=dict(restoration.kept_aliases),
        )
