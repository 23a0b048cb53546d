"""Request and response bodies of the soft prompt routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from prompt_store.types import SHARED, HistoryEntry, PromptSummary, PromptVersion, check_name
from server.api.request_body import RequestBody


class FileBody(BaseModel):
    """A stored file; ``size`` is in bytes."""

    filename: str
    sha256: str
    size: int


class VersionBody(BaseModel):
    """An immutable version of a soft prompt."""

    object: str = "prompt.version"
    id: str = Field(description="The soft prompt's name.")
    version: int
    digest: str = Field(description="SHA-256 over the version's files.")
    peft_type: str
    task_type: str
    num_virtual_tokens: int
    dtype: str
    base_model_name_or_path: str | None
    files: list[FileBody]
    size: int = Field(description="Total size of the files, in bytes.")
    created_at: int = Field(description="Unix time in seconds.")
    description: str
    tags: list[str]
    metadata: dict[str, Any]
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

    object: str = "prompt"
    id: str
    aliases: dict[str, int]
    num_versions: int
    pinned: list[int] = Field(description="Versions pinned on this server.")
    latest: VersionBody

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

    object: str = "list"
    data: list[PromptBody]
    has_more: bool
    last_id: str | None


class VersionList(BaseModel):
    """A page of a soft prompt's versions, newest first; ``last_id`` is the next page's ``before``."""

    object: str = "list"
    data: list[VersionBody]
    has_more: bool
    last_id: int | None


class HistoryBody(BaseModel):
    """One change of a soft prompt."""

    object: str = "prompt.change"
    id: int
    action: str = Field(
        description="publish, promote, rollback, delete_alias, delete_version or delete_prompt; an upload that moves "
        "an alias adds a publish and a promote."
    )
    alias: str | None
    version: int | None = Field(
        description="The version that was published or deleted, or that the alias points at now."
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

    object: str = "list"
    data: list[HistoryBody]
    has_more: bool
    last_id: int | None


class AliasBody(RequestBody):
    """The version that an alias should point at."""

    version: int = Field(ge=1, lt=2**63)
    expected_version: int | None = Field(
        None, ge=1, lt=2**63, description="Fail with 409 unless the alias points at this version."
    )


class RollbackBody(RequestBody):
    """The condition of a rollback."""

    expected_version: int | None = Field(
        None, ge=1, lt=2**63, description="Fail with 409 unless the alias points at this version."
    )


class WarmBody(RequestBody):
    """The version to load onto the device; default: the alias latest."""

    version: int | None = Field(None, ge=1, lt=2**63)
    alias: Annotated[str, AfterValidator(lambda text: check_name(text, "alias"))] | None = None
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
    """The version that was loaded onto the device."""

    object: str = "prompt.warmed"
    id: str
    version: int
    task_ids: list[int] | None = Field(description="Task ids of a multitask prompt.")
    pinned: bool
    seconds: float = Field(description="Duration in seconds; 0 if a pin was released.")


class AliasReply(BaseModel):
    """The version that an alias points at."""

    object: str = "prompt.alias"
    id: str
    alias: str
    version: int


class Deleted(BaseModel):
    """The deleted object."""

    id: str
    object: str
    deleted: bool = True
