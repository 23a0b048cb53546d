"""``/v1/keys``: the API keys, without anything that could authenticate."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from prompt_store.types import SHARED
from server.api.keys.callers import Scope
from server.api.keys.key_file import Key
from server.api.keys.keys import ApiKeys, KeyUse
from server.api.operations import Operation
from server.api.prompts.bodies import ObjectType
from server.api.services import ServicesDep

router = APIRouter(prefix="/v1/keys", tags=["server"])


class KeyLimits(BaseModel):
    """The limits of a key; null if it has none of a kind."""

    requests_per_minute: int | None = Field(description="Requests per minute.")
    tokens_per_minute: int | None = Field(description="Tokens per minute, of prompts and answers.")
    max_concurrency: int | None = Field(description="Requests at the same time.")


class KeyBody(BaseModel):
    """One API key, by the beginning of its digest."""

    object: ObjectType = "key"
    id: str = Field(description="`key-` and the first twelve characters of its SHA-256, as in history and logs.")
    name: str | None = Field(description="Its name in the key file.")
    tenant: str | None = Field(description="Its tenant; null if it has none.")
    scopes: list[Scope] = Field(description="Its permissions.")
    limits: KeyLimits = Field(description="Its limits.")
    running: int = Field(description="Requests that count against its limits and run now.")
    requests: int = Field(description="Requests with it since this server started, refused ones included.")
    last_used_at: int | None = Field(description="When it was last used; Unix time in seconds.")

    @classmethod
    def of(cls, key: Key, use: KeyUse) -> KeyBody:
        """Convert a key; its digest alone could be attacked, so only the beginning is shown."""
        caller = key.caller
        limits = caller.limiter.limits
        return cls(
            id=f"key-{key.digest.hex()[:12]}",
            name=caller.key_name,
            tenant=None if caller.tenant == SHARED else caller.tenant,
            scopes=sorted(caller.scopes),
            limits=KeyLimits(
                requests_per_minute=limits.requests_per_minute,
                tokens_per_minute=limits.tokens_per_minute,
                max_concurrency=limits.max_concurrency,
            ),
            running=caller.limiter.num_running,
            requests=use.requests,
            last_used_at=None if use.last_used_at is None else int(use.last_used_at),
        )


class ReloadBody(BaseModel):
    """The last reload of the key file."""

    at: int = Field(description="Unix time in seconds.")
    error: str | None = Field(description="Why the file could not be used, so that the old keys remain.")


class KeyList(BaseModel):
    """All API keys of this server."""

    object: ObjectType = "list"
    data: list[KeyBody] = Field(description="The keys, in the order of the key file; empty without keys.")
    last_reload: ReloadBody | None = Field(description="The last reload of the key file; null if there was none.")


@router.get("")
@Operation(scopes={Scope.ADMIN}, errors=())
async def list_keys(services: ServicesDep) -> KeyList:
    """List the API keys with tenant, scopes, limits and use on this server. No key and no whole digest is shown."""
    keys: ApiKeys | None = services.api_keys
    if keys is None:
        return KeyList(data=[], last_reload=None)
    reload = keys.last_reload
    return KeyList(
        data=[KeyBody.of(key, use) for key, use in keys.described()],
        last_reload=None if reload is None else ReloadBody(at=int(reload.at), error=reload.error),
    )
