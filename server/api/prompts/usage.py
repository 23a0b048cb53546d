"""The use of the versions of a soft prompt, and the deletion of versions that are not needed any more."""

from __future__ import annotations

import time

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from prompt_store.changes import HistoryAction
from prompt_store.use import Use, VersionUse
from server.api.keys.callers import Scope
from server.api.operations import Operation
from server.api.prompts.acting import ActingDep
from server.api.prompts.bodies import HasMore, ObjectType, PromptName, Reason
from server.api.prompts.routes import Before, Limit, PromptId
from server.api.request_body import RequestBody, require_json
from server.api.services import Services, ServicesDep

router = APIRouter(prefix="/v1/prompts", tags=["soft prompts"])

_MAX_SECONDS = 2**36


class VersionUsageBody(BaseModel):
    """The use of one version, by all tenants."""

    object: ObjectType = "prompt.usage"
    version: int = Field(description="Version number.")
    created_at: int = Field(description="When it was published; Unix time in seconds.")
    last_used_at: int | None = Field(description="When it was last used; Unix time in seconds.")
    requests: int = Field(description="Number of admitted requests.")
    errors: int = Field(description="Number of them that failed.")
    prompt_tokens: int = Field(description="Text tokens of their prompts.")
    completion_tokens: int = Field(description="Tokens of their answers.")

    @classmethod
    def of(cls, found: VersionUse, pending: Use) -> VersionUsageBody:
        """Convert the catalog's record, with what this server has not stored yet."""
        use = found.use + pending
        return cls(
            version=found.version,
            created_at=found.created_at // 1_000_000,
            last_used_at=use.last_used_at // 1_000_000 or None,
            requests=use.requests,
            errors=use.errors,
            prompt_tokens=use.prompt_tokens,
            completion_tokens=use.completion_tokens,
        )


class UsageList(BaseModel):
    """A page of the use of a soft prompt's versions, newest first; ``last_id`` is the next page's ``before``."""

    object: ObjectType = "list"
    data: list[VersionUsageBody] = Field(description="The versions, newest first.")
    has_more: HasMore
    last_id: int | None = Field(description="Value of `before` that fetches the next page.")


class PruneBody(RequestBody):
    """Which versions to keep."""

    keep: int = Field(ge=1, lt=2**31, description="Number of newest versions to keep.")
    older_than: int = Field(
        ge=0,
        le=_MAX_SECONDS,
        description="Delete only versions that were neither published nor used within this number of seconds.",
    )
    dry_run: bool = Field(False, description="true: delete nothing, and return what would be deleted.")
    reason: Reason | None = Field(None, description="Reason of the change, for the history.")


class Pruned(BaseModel):
    """The deleted versions."""

    object: ObjectType = "prompt.pruned"
    id: PromptName
    versions: list[int] = Field(description="The deleted versions, or those that would be deleted.")
    dry_run: bool = Field(description="Whether nothing was deleted.")


@router.get("/{id}/usage")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(404, 503))
async def get_usage(
    name: PromptId, services: ServicesDep, acting: ActingDep, limit: Limit = 100, before: Before = None
) -> UsageList:
    """Get the use of each version: last use, requests and tokens.

    Only for the owner, and for admins if it is shared. Requests of the last minute to other servers may be missing.
    """
    store, usage = services.store, services.usage
    found, has_more = await store.call(store.registry.usage, name, limit, before, acting.access)
    data = [VersionUsageBody.of(one, usage.pending(name, one.version)) for one in found]
    return UsageList(data=data, has_more=has_more, last_id=data[-1].version if data else None)


@router.post("/{id}/prune", dependencies=[Depends(require_json)])
@Operation(
    scopes={Scope.PROMPTS_WRITE},
    errors=(404, 503),
    example={"keep": 3, "older_than": 7776000, "dry_run": True},
)
async def prune(name: PromptId, body: PruneBody, services: ServicesDep, acting: ActingDep) -> Pruned:
    """Delete old versions that no alias points at, that are not pinned on this server, and that are not used.

    They can be restored for a time, like others.
    """
    store = services.store
    pruned = await store.prune(
        name,
        keep=body.keep,
        before=time.time_ns() // 1000 - body.older_than * 1_000_000,
        spared=_spared(services, name),
        dry_run=body.dry_run,
        actor=acting.actor(body.reason),
        access=acting.access,
    )
    if pruned and not body.dry_run:
        acting.changed(HistoryAction.DELETE_VERSION, name)
        for version in pruned:
            await services.warmer.forget(name, version)
    return Pruned(id=name, versions=pruned, dry_run=body.dry_run)


def _spared(services: Services, name: str) -> set[int]:
    """Versions that are pinned here, or whose use is not in the catalog yet."""
    return {*services.warmer.pinned_versions(name), *services.usage.pending_versions(name)}
