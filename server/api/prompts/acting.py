"""Who asks a route of the registry, what they may see, and the record of what they did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query
from pydantic import AfterValidator
from starlette.requests import Request

from prompt_store.changes import Actor, HistoryAction
from prompt_store.types import SHARED, Access
from server.api.inference.request_record import RequestRecord, record_of
from server.api.keys.callers import Caller, CallerDep, Scope
from server.api.prompts.bodies import check_reason
from server.api.services import Services, ServicesDep
from server.errors import PermissionDeniedError

ReasonQuery = Annotated[
    str | None,
    Query(description="Reason of the change, for the history."),
    AfterValidator(lambda text: text and check_reason(text)),
]


@dataclass(frozen=True, slots=True)
class Acting:
    """The caller of a route of the registry.

    Attributes:
        caller: The sender of the request.
        access: What they may see and change with this request.
        record: The request's log record.
        services: The server.
    """

    caller: Caller
    access: Access
    record: RequestRecord
    services: Services

    def actor(self, reason: str | None = None) -> Actor:
        """The caller as the author of a change; its reason goes to the log too."""
        self.record.reason = reason
        return self.caller.actor(reason)

    def changed(
        self, action: HistoryAction, name: str, *, version: int | None = None, alias: str | None = None
    ) -> None:
        """Name a change in the log line of the request, and tell those who follow the catalog."""
        self.services.catalog_changes.note({name})  # the store reports changes by other servers only
        record = self.record
        record.change, record.prompt, record.version, record.alias = action.value, name, version, alias

    async def has_listed(self, owners: Iterable[str]) -> None:
        """Record in the history if a list has shown what belongs to other tenants."""
        others = sorted({owner for owner in owners if self._is_anothers(owner)})
        if others:
            await self._note("", self.access.tenant, {"read": "list", "tenants": others})

    async def has_read(self, name: str, owner: str, what: str, *, version: int | None = None) -> None:
        """Record in the history if what was read belongs to another tenant."""
        if self._is_anothers(owner):
            await self._note(name, owner, {"read": what}, version)

    def _is_anothers(self, owner: str) -> bool:
        return self.access.all_tenants and owner not in (SHARED, self.access.tenant)

    async def _note(self, name: str, owner: str, details: dict[str, object], version: int | None = None) -> None:
        store = self.services.store
        await store.call(store.registry.note_read, name, owner, details, version, actor=self.caller.actor())


async def _acting(
    request: Request,
    caller: CallerDep,
    services: ServicesDep,
    all_tenants: Annotated[
        bool, Query(description="Include the soft prompts of all tenants; requires the scope admin.")
    ] = False,
) -> Acting:
    if all_tenants and Scope.ADMIN not in caller.scopes:
        raise PermissionDeniedError("all_tenants: requires an API key with the scope admin", scopes=["admin"])
    access = Access(caller.tenant, may_change_shared=Scope.ADMIN in caller.scopes, all_tenants=all_tenants)
    return Acting(caller, access, record_of(request), services)


ActingDep = Annotated[Acting, Depends(_acting)]
"""The caller; the route gets the parameter ``all_tenants``."""
