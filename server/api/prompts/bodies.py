"""What the routes of soft prompts take and answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from prompt_store.types import SHARED, HistoryEntry, PromptSummary, PromptVersion, check_name
from server.api.request_body import RequestBody


class FileBody(BaseModel):
    """One stored file; ``size`` is in bytes."""

    filename: str
    sha256: str
    size: int


class VersionBody(BaseModel):
    """One immutable version of a soft prompt."""

    object: str = "prompt.version"
    id: str = Field(description="The soft prompt's name.")
    version: int
    digest: str = Field(description="sha256 over the version's files.")
    peft_type: str
    task_type: str
    num_virtual_tokens: int
    dtype: str
    base_model_name_or_path: str | None
    files: list[FileBody]
    size: int = Field(description="Bytes of all files.")
    created_at: int = Field(description="Unix seconds.")
    description: str
    tags: list[str]
    metadata: dict[str, Any]
    lineage: dict[str, Any] = Field(
        description="training_run, parent, dataset_digest, scores; what is known of them."
    )
    overrides: dict[str, Any] = Field(
        description="What was accepted beyond the word of its files: allow_other_base (true) where they name another "
        "base than the served one, task_type where they name none."
    )
    created_by: str | None = Field(description="Which API key published it.")
    num_tasks: int | None = Field(description="Tasks of a multitask prompt, of which a request names one.")
    num_labels: int | None = Field(description="Labels of its classification head.")
    shared: bool = Field(description="Whether every tenant may use it.")
    pinned: bool = Field(description="Whether this server keeps it at hand.")

    @classmethod
    def of(cls, version: PromptVersion, *, pinned: bool) -> VersionBody:
        """The catalog's record as the API shows it."""
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
    """A soft prompt: its aliases and the version that its bare name means."""

    object: str = "prompt"
    id: str
    aliases: dict[str, int]
    num_versions: int
    pinned: list[int] = Field(description="The versions that this server keeps at hand.")
    latest: VersionBody

    @classmethod
    def of(cls, summary: PromptSummary, *, pinned: list[int]) -> PromptBody:
        """The catalog's summary as the API shows it."""
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
    """A page of one soft prompt's versions, newest first; ``last_id`` is the next page's ``before``."""

    object: str = "list"
    data: list[VersionBody]
    has_more: bool
    last_id: int | None


class HistoryBody(BaseModel):
    """One change of one soft prompt."""

    object: str = "prompt.change"
    id: int
    action: str = Field(
        description="publish, promote, rollback, delete_alias, delete_version or delete_prompt; an upload that moves "
        "an alias is a publish and a promote."
    )
    alias: str | None
    version: int | None = Field(description="What was published or deleted, or what the alias points at since.")
    previous_version: int | None = Field(description="What the alias pointed at before.")
    actor: str | None = Field(description="Which API key did it.")
    created_at: int = Field(description="Unix seconds.")

    @classmethod
    def of(cls, entry: HistoryEntry) -> HistoryBody:
        """The catalog's record as the API shows it."""
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
    """A page of one soft prompt's history, newest first; ``last_id`` is the next page's ``before``."""

    object: str = "list"
    data: list[HistoryBody]
    has_more: bool
    last_id: int | None


class AliasBody(RequestBody):
    """Where an alias is to point."""

    version: int = Field(ge=1, lt=2**63)
    expected_version: int | None = Field(None, ge=1, lt=2**63, description="409 unless the alias points there now.")


class RollbackBody(RequestBody):
    """Which state a rollback is meant for."""

    expected_version: int | None = Field(None, ge=1, lt=2**63, description="409 unless the alias points there now.")


class WarmBody(RequestBody):
    """Which soft prompt to bring onto the device; by default what the alias latest means."""

    version: int | None = Field(None, ge=1, lt=2**63)
    alias: Annotated[str, AfterValidator(lambda text: check_name(text, "alias"))] | None = None
    task_id: int | None = Field(None, ge=0, lt=2**63, description="One task of a multitask prompt; by default all.")
    pin: bool | None = Field(
        None,
        description="true keeps its files on this machine and its rows in host memory, until false, its deletion or "
        "a restart; a pin by alias (latest, where none is named) moves with the alias. false ends the pin and brings "
        "nothing onto the device.",
    )


class WarmReply(BaseModel):
    """What is on the device now."""

    object: str = "prompt.warmed"
    id: str
    version: int
    task_ids: list[int] | None = Field(description="The tasks of a multitask prompt.")
    pinned: bool
    seconds: float = Field(description="How long it took; 0 where a pin was ended.")


class AliasReply(BaseModel):
    """Where an alias points."""

    object: str = "prompt.alias"
    id: str
    alias: str
    version: int


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str
    deleted: bool = True
