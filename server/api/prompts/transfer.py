"""The import of aliases and history from another server; versions come as uploads with the field ``version``."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, Field, model_validator

from prompt_store.changes import MAX_REASON_CHARS, HistoryAction, ImportedEntry
from prompt_store.types import check_name
from server.api.keys.callers import Scope
from server.api.operations import Operation, Quota
from server.api.prompts.acting import ActingDep
from server.api.prompts.bodies import ObjectType, PromptName, RolloutBody
from server.api.prompts.edits import check_metadata
from server.api.prompts.routes import PromptId
from server.api.request_body import RequestBody, require_json
from server.api.services import ServicesDep

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"])

_MAX_ENTRIES = 1000
_MAX_ALIASES = 1000
_MAX_NAME_CHARS = 256
_MAX_SECONDS = 2**36

_Number = Annotated[int, Field(ge=1, lt=2**63)]
_Alias = Annotated[str, AfterValidator(lambda text: check_name(text, "alias"))]
_Text = Annotated[str, Field(max_length=MAX_REASON_CHARS), AfterValidator(lambda text: text.replace("\0", " "))]


class ImportedEntryBody(RequestBody):
    """A change in the history of another server, as its ``GET /v1/prompts/{id}/history`` returns it."""

    action: str = Field(description="The kind of change.")
    alias: _Alias | None = Field(None, description="The alias that was moved or deleted.")
    version: _Number | None = Field(None, description="The version that the change is about.")
    previous_version: _Number | None = Field(None, description="The version that the alias pointed at before.")
    actor: Annotated[str, Field(max_length=_MAX_NAME_CHARS)] | None = Field(
        None, description="API key that made the change."
    )
    actor_name: Annotated[str, Field(max_length=_MAX_NAME_CHARS)] | None = Field(
        None, description="Name of this key."
    )
    reason: _Text | None = Field(None, description="Reason that was given.")
    details: Annotated[dict[str, Any], AfterValidator(check_metadata)] = Field({}, description="What was edited.")
    created_at: int = Field(ge=0, le=_MAX_SECONDS, description="Unix time in seconds.")

    @property
    def entry(self) -> ImportedEntry | None:
        """The entry for the store; None if this release does not know the kind of change."""
        if self.action not in list(HistoryAction):
            return None
        return ImportedEntry(
            action=HistoryAction(self.action),
            alias=self.alias,
            version=self.version,
            previous_version=self.previous_version,
            actor=self.actor,
            actor_name=self.actor_name,
            reason=self.reason,
            details=self.details,
            at=self.created_at * 1_000_000,
        )


class ImportBody(RequestBody):
    """History and aliases of a soft prompt on another server."""

    history: Annotated[list[ImportedEntryBody], Field(max_length=_MAX_ENTRIES)] = Field(
        [], description="Changes, oldest first. Those that are known already are not added again."
    )
    aliases: Annotated[dict[_Alias, _Number], Field(max_length=_MAX_ALIASES)] = Field(
        {}, description="Version numbers by alias."
    )
    rollouts: Annotated[dict[_Alias, RolloutBody], Field(max_length=_MAX_ALIASES)] = Field(
        {},
        description="Rollouts by alias; one starts only if its alias is created or moved, or with `move_aliases`.",
    )
    move_aliases: bool = Field(False, description="true: also move aliases that point elsewhere.")

    @model_validator(mode="after")
    def _check_rollouts(self) -> Self:
        for alias, rollout in self.rollouts.items():
            if alias in self.aliases:
                rollout.rollout.check(self.aliases[alias])
        return self


class ImportedReply(BaseModel):
    """What an import has added."""

    object: ObjectType = "prompt.imported"
    id: PromptName
    aliases: dict[str, int] = Field(description="Created or moved aliases, with the versions that they point at.")
    kept_aliases: dict[str, int] = Field(description="Aliases that point elsewhere and were not moved.")
    missing_aliases: list[str] = Field(description="Aliases whose version does not exist here.")
    missing_rollouts: list[str] = Field(
        description="Aliases whose rollout names a version that does not exist here; it was not started."
    )
    num_entries: int = Field(description="Number of entries added to the history.")
    skipped_entries: int = Field(description="Number of entries of kinds that this release does not know.")


@router.post("/{id}/import", dependencies=[Depends(require_json)])
@Operation(
    scopes={Scope.PROMPTS_WRITE},
    errors=(404, 503),
    quota=Quota.REQUESTS,
    example={"aliases": {"latest": 1}},
)
async def import_history(name: PromptId, body: ImportBody, services: ServicesDep, acting: ActingDep) -> ImportedReply:
    """Add the history and the aliases of a soft prompt on another server; upload its versions before.

    Added entries are marked as imported. Repeating an import changes nothing.
    """
    known = [entry.entry for entry in body.history]
    entries = [entry for entry in known if entry is not None]
    store = services.store
    imported = await store.call(
        store.registry.import_history,
        name,
        entries,
        body.aliases,
        rollouts={alias: rollout.rollout for alias, rollout in body.rollouts.items()},
        move_aliases=body.move_aliases,
        actor=acting.actor(),
        access=acting.access,
    )
    acting.changed(HistoryAction.IMPORT, name)
    for alias in imported.aliases:
        services.warmer.promoted(name, alias)
    return ImportedReply(
        id=name,
        aliases=dict(imported.aliases),
        kept_aliases=dict(imported.kept_aliases),
        missing_aliases=list(imported.missing_aliases),
        missing_rollouts=list(imported.missing_rollouts),
        num_entries=imported.num_entries,
        skipped_entries=len(known) - len(entries),
    )
