"""Request and response bodies of the soft prompt routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, model_validator

from prompt_store.catalog.search import PromptSearch, PromptSort
from prompt_store.changes import MAX_REASON_CHARS, Deletion, HistoryAction, HistoryEntry, Restoration
from prompt_store.rollouts import NO_ROLLOUT, Rollout
from prompt_store.types import SHARED, PeftType, PromptKind, PromptSummary, PromptVersion, check_name
from prompt_store.use import Use
from server.api.request_body import RequestBody
from server.api.soft_prompts.residency import Residency

ObjectType = Annotated[str, Field(description="Type of the object.")]
PromptName = Annotated[str, Field(description="The soft prompt's name.")]
HasMore = Annotated[bool, Field(description="Whether there is another page.")]
ExpectedVersion = Annotated[
    int | None, Field(ge=1, lt=2**63, description="Fail with 409 unless the alias points at this version.")
]


def check_reason(text: str) -> str:
    """Return the reason of a change unchanged.

    Raises:
        ValueError: If it is too long, or has control characters.
    """
    if len(text) > MAX_REASON_CHARS:
        raise ValueError(f"at most {MAX_REASON_CHARS} characters, not {len(text)}")
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


Reason = Annotated[
    str,
    AfterValidator(check_reason),
]


class FileBody(BaseModel):
    """A stored file; ``size`` is in bytes."""

    filename: str = Field(description="Name of the file.")
    sha256: str = Field(description="SHA-256 digest of the file, in hexadecimal.")
    size: int = Field(description="Size in bytes.")


class VersionBody(BaseModel):
    """An immutable version of a soft prompt or an adapter."""

    object: ObjectType = "prompt.version"
    id: PromptName
    version: int = Field(description="Version number, from 1.")
    digest: str = Field(description="SHA-256 over the version's files.")
    kind: str = Field(description="`soft_prompt` or `adapter`.")
    peft_type: str = Field(description="PEFT method that trained it.")
    task_type: str = Field(description="`CAUSAL_LM` or `SEQ_CLS`.")
    num_virtual_tokens: int = Field(description="Number of positions before the text; 0 for an adapter.")
    dtype: str = Field(description="Element type of its tensors, as named by safetensors.")
    base_model_name_or_path: str | None = Field(description="The base model named in its configuration.")
    files: list[FileBody] = Field(description="The stored files.")
    size: int = Field(description="Total size of the files, in bytes.")
    created_at: int = Field(description="Unix time in seconds.")
    description: str = Field(description="Free text.")
    tags: list[str] = Field(description="Tags to filter by.")
    metadata: dict[str, Any] = Field(description="JSON object of the uploader.")
    lineage: dict[str, Any] = Field(description="Known values of training_run, parent, dataset_digest and scores.")
    format: dict[str, Any] | None = Field(
        description="How the version wants to be asked: type (raw, chat or template), and known values of separator, "
        "system, template and sampling; null if that is not known."
    )
    overrides: dict[str, Any] = Field(
        description="Overrides given at upload: allow_other_base (true) if the files name another base model, "
        "task_type if they name none."
    )
    created_by: str | None = Field(description="API key that published the version.")
    num_tasks: int | None = Field(description="Number of tasks of a multitask prompt.")
    num_labels: int | None = Field(description="Number of labels of the classification head.")
    rank: int | None = Field(description="Largest rank of an adapter; 0 for an IA3.")
    num_modules: int | None = Field(description="Number of modules that an adapter changes.")
    num_parameters: int | None = Field(description="Number of parameters of an adapter.")
    targets: list[str] = Field(description="Last parts of the names of the modules that an adapter changes.")
    over: str | None = Field(description="NAME@VERSION of the adapter that a soft prompt was trained over.")
    shared: bool = Field(description="Whether it is shared with all tenants.")
    owner: str | None = Field(description="The tenant that alone sees it; null if it is shared.")
    pinned: bool = Field(description="Whether it is pinned on this server.")
    residency: Residency | None = Field(
        None, description="Only with `include=residency`: where it lies on this server."
    )

    @classmethod
    def of(cls, version: PromptVersion, *, pinned: bool, residency: Residency | None = None) -> VersionBody:
        """Convert the catalog's record."""
        return cls(
            id=version.name,
            version=version.version,
            digest=version.digest,
            kind=version.kind.value,
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
            format=None if version.format is None else version.format.to_json(),
            overrides=dict(version.overrides),
            created_by=version.created_by,
            shared=version.owner == SHARED,
            owner=version.owner or None,
            num_tasks=version.num_tasks,
            num_labels=version.num_labels,
            rank=version.rank,
            num_modules=version.num_modules,
            num_parameters=version.num_parameters,
            targets=list(version.targets),
            over=version.over,
            pinned=pinned,
            residency=residency,
        )


class ShadowBody(RequestBody):
    """A version that gets copies of requests; its answers are compared and never returned."""

    version: int = Field(ge=1, lt=2**63, description="The version.")
    percent: float = Field(gt=0, le=100, description="Percent of the requests that are copied.")


class RolloutBody(RequestBody):
    """How an alias shares its requests among versions."""

    canaries: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(
        {}, description="Percent of the requests by version; the alias's own version answers all others."
    )
    shadow: ShadowBody | None = Field(
        None, description="A version that gets copies of requests; its answers are compared and never returned."
    )
    _rollout: Rollout = PrivateAttr(NO_ROLLOUT)

    @model_validator(mode="after")
    def _parse(self) -> Self:
        shadow = None if self.shadow is None else self.shadow.model_dump()
        self._rollout = Rollout.parse({"canaries": self.canaries, "shadow": shadow})
        return self

    @property
    def rollout(self) -> Rollout:
        """It as the catalog has it."""
        return self._rollout

    @classmethod
    def of(cls, rollout: Rollout) -> Self:
        """Convert the catalog's record."""
        return cls.model_validate(rollout.to_json())


class PromptUsage(BaseModel):
    """The use of all versions of a soft prompt, by all tenants."""

    last_used_at: int | None = Field(description="When one was last used; Unix time in seconds.")
    requests: int = Field(description="Number of admitted requests.")
    errors: int = Field(description="Number of them that failed.")
    prompt_tokens: int = Field(description="Text tokens of their prompts.")
    completion_tokens: int = Field(description="Tokens of their answers.")
    p95_seconds: float | None = Field(
        description="95th percentile of the seconds from a request's arrival to the end of its answer, of the newest "
        "128 requests of the last hour on this server, without the service tier `batch`; null without any."
    )

    @classmethod
    def of(cls, use: Use, p95_seconds: float | None) -> PromptUsage:
        """Convert the catalog's record, with what this server has measured."""
        return cls(
            last_used_at=use.last_used_at // 1_000_000 or None,
            requests=use.requests,
            errors=use.errors,
            prompt_tokens=use.prompt_tokens,
            completion_tokens=use.completion_tokens,
            p95_seconds=None if p95_seconds is None else round(p95_seconds, 6),
        )


class PromptBody(BaseModel):
    """A soft prompt with its aliases and its latest version."""

    object: ObjectType = "prompt"
    id: PromptName
    aliases: dict[str, int] = Field(description="Version numbers by alias.")
    rollouts: dict[str, RolloutBody] = Field(
        description="How aliases share their requests among versions, for those that do."
    )
    num_versions: int = Field(description="Number of versions.")
    pinned: list[int] = Field(description="Versions pinned on this server.")
    latest: VersionBody = Field(
        description="The version that the alias `latest` points at; without this alias, the highest one."
    )
    usage: PromptUsage | None = Field(
        None,
        description="Only in lists with `include=usage`; null if it is shared and the key lacks the scope admin.",
    )

    @classmethod
    def of(
        cls,
        summary: PromptSummary,
        *,
        pinned: list[int],
        usage: PromptUsage | None = None,
        residency: Residency | None = None,
    ) -> PromptBody:
        """Convert the catalog's summary; the residency is that of its latest version."""
        return cls(
            id=summary.name,
            aliases=dict(summary.aliases),
            rollouts={alias: RolloutBody.of(rollout) for alias, rollout in summary.rollouts.items()},
            num_versions=summary.num_versions,
            pinned=pinned,
            latest=VersionBody.of(summary.latest, pinned=summary.latest.version in pinned, residency=residency),
            usage=usage,
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
    prompt_id: str | None = Field(description="The soft prompt's name; null if the entry is about no single one.")
    action: HistoryAction = Field(
        description="The kind of change; a change of several versions or aliases adds an entry for each: an upload "
        "adds a publish and a promote. read_across_tenants: an administrator has read what belongs to a tenant."
    )
    alias: str | None = Field(description="The alias that was moved or deleted.")
    version: int | None = Field(
        description="The version that was published, edited, deleted or restored, or that the alias points at now."
    )
    previous_version: int | None = Field(description="The version that the alias pointed at before.")
    actor: str | None = Field(description="API key that made the change.")
    actor_name: str | None = Field(description="Name that the key file gave this key at that time.")
    reason: str | None = Field(description="Reason that was given for the change.")
    details: dict[str, Any] = Field(
        description="For an edit, `from` and `to` of each changed field; for a rollout, `from` and `to`."
    )
    imported: bool = Field(description="Whether the change was made on another server, and its history imported.")
    created_at: int = Field(description="Unix time in seconds.")

    @classmethod
    def of(cls, entry: HistoryEntry) -> HistoryBody:
        """Convert the catalog's record."""
        return cls(
            id=entry.id,
            prompt_id=entry.name or None,
            action=entry.action,
            alias=entry.alias,
            version=entry.version,
            previous_version=entry.previous_version,
            actor=entry.actor,
            actor_name=entry.actor_name,
            reason=entry.reason,
            details=dict(entry.details),
            imported=entry.is_imported,
            created_at=int(entry.at.timestamp()),
        )


class HistoryList(BaseModel):
    """A page of a soft prompt's history, newest first; ``last_id`` is the next page's ``before``."""

    object: ObjectType = "list"
    data: list[HistoryBody] = Field(description="The changes, newest first.")
    has_more: HasMore
    last_id: int | None = Field(description="Value of `before` that fetches the next page.")


class ExpectedRollout(RolloutBody):
    """The rollout that an alias must have; ``{}`` is none."""


class Expected(RequestBody):
    """What an alias must be for a change of it, so that no change of another client is overwritten."""

    expected_version: ExpectedVersion = None
    expected_rollout: ExpectedRollout | None = Field(
        None,
        description="Fail with 409 unless the alias has exactly this rollout (`canaries` and `shadow`); `{}`: unless "
        "it has none.",
    )

    @property
    def expected(self) -> Rollout | None:
        """The expected rollout as the catalog has it; None expects nothing."""
        return None if self.expected_rollout is None else self.expected_rollout.rollout


class AliasBody(RolloutBody, Expected):
    """The version that an alias should point at, and the whole of its rollout; without one, a rollout ends."""

    version: int = Field(ge=1, lt=2**63, description="The version that the alias should point at.")
    reason: Reason | None = Field(None, description="Reason of the change, for the history.")

    @model_validator(mode="after")
    def _check_versions(self) -> Self:
        self.rollout.check(self.version)
        return self


class RollbackBody(Expected):
    """The conditions of a rollback."""

    reason: Reason | None = Field(None, description="Reason of the change, for the history.")


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
    rollout: RolloutBody | None = Field(description="How it shares its requests; null if it has no rollout.")


class Deleted(BaseModel):
    """The deleted object."""

    id: str = Field(description="Name of the deleted object: NAME, NAME@VERSION or NAME@ALIAS.")
    object: ObjectType
    deleted: Annotated[bool, Field(description="Always true.")] = True


class DeletedVersions(Deleted):
    """A deleted version, or a deleted soft prompt with all its versions."""

    versions: list[int] = Field(description="The deleted versions.")
    aliases: dict[str, int] = Field(description="The removed aliases, with the versions that they pointed at.")
    ended_rollouts: list[str] = Field(
        description="Aliases that remain, and whose rollouts ended because they named a deleted version."
    )
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
            ended_rollouts=list(deletion.ended_rollouts),
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


SearchText = Annotated[
    str | None,
    Query(max_length=200, description="Return only those with this text in their name, a tag or a description."),
]


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """What a list is searched for, and its order."""

    q: SearchText = None
    peft_type: Annotated[PeftType | None, Query(description="Return only names with a version of this method.")] = (
        None
    )
    sort: Annotated[
        PromptSort,
        Query(
            description="Order: `name`, `created` (oldest version), `updated` (newest version) or `used` (last use)."
        ),
    ] = PromptSort.NAME
    order: Annotated[
        Literal["asc", "desc"] | None,
        Query(description="`asc` or `desc`; default: names ascending, times descending."),
    ] = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a list of all names in order."""
        return not self.q and self.peft_type is None and self.sort is PromptSort.NAME and self.order != "desc"

    def search(
        self,
        *,
        limit: int,
        after: str | None,
        tag: str | None,
        kind: PromptKind | None,
        unused_since: int | None,
    ) -> PromptSearch:
        """The search, with the other fields of the request."""
        return PromptSearch(
            text=self.q or None,
            peft_type=self.peft_type,
            tag=tag,
            kind=kind,
            unused_since=unused_since,
            sort=self.sort,
            is_descending=self.order == "desc" or (self.order is None and self.sort is not PromptSort.NAME),
            after=after,
            limit=limit,
        )
