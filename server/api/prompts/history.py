"""``/v1/history``: the changes of all names."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import AfterValidator

from prompt_store.changes import HistoryAction, HistoryFilter
from prompt_store.types import check_name
from server.api.keys.callers import Scope
from server.api.operations import Operation
from server.api.prompts.acting import ActingDep
from server.api.prompts.bodies import HistoryBody, HistoryList
from server.api.prompts.routes import Before, Limit
from server.api.services import ServicesDep

router = APIRouter(prefix="/v1/history", tags=["soft prompts"])

_MAX_SECONDS = 2**40
Time = Annotated[int | None, Query(ge=0, le=_MAX_SECONDS)]


@router.get("")
@Operation(scopes={Scope.PROMPTS_READ}, errors=(503,))
async def list_all_history(
    services: ServicesDep,
    acting: ActingDep,
    prompt_id: Annotated[
        str | None,
        Query(description="Return only changes of this soft prompt."),
        AfterValidator(lambda name: name and check_name(name, "name")),
    ] = None,
    actor: Annotated[
        str | None, Query(max_length=256, description="Return only changes by this API key: its name or `key-...`.")
    ] = None,
    action: Annotated[HistoryAction | None, Query(description="Return only changes of this kind.")] = None,
    since: Annotated[Time, Query(description="Return changes made at this Unix time in seconds, or later.")] = None,
    until: Annotated[Time, Query(description="Return changes made before this Unix time in seconds.")] = None,
    limit: Limit = 100,
    before: Before = None,
) -> HistoryList:
    """List the changes of all soft prompts of the tenant and of shared ones, newest first, deleted ones included."""
    only = HistoryFilter(
        name=prompt_id or None,
        actor=actor or None,
        action=action,
        since=None if since is None else since * 1_000_000,
        until=None if until is None else until * 1_000_000,
    )
    store = services.store
    entries, has_more = await store.call(store.registry.list_history, only, limit, before, acting.access)
    data = [HistoryBody.of(entry) for entry in entries]
    return HistoryList(data=data, has_more=has_more, last_id=data[-1].id if data else None)
