"""The caller of a request: tenant and scopes of its API key."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from prompt_store.types import SHARED, Access
from server.api.keys.limits import KeyLimiter, Limits


class Scope(StrEnum):
    """A permission of an API key."""

    GENERATE = "generate"
    PROMPTS_READ = "prompts:read"
    PROMPTS_WRITE = "prompts:write"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: Name of the key in records, which does not reveal the key; None without keys.
        tenant: Owner of soft prompts, cached texts and turns in the queue; ``SHARED`` without keys.
        scopes: Permissions of the key.
        limiter: Enforces the limits of the key.
    """

    name: str | None
    tenant: str
    scopes: frozenset[Scope]
    limiter: KeyLimiter = field(default_factory=lambda: KeyLimiter(Limits()), compare=False)

    @property
    def access(self) -> Access:
        """The soft prompts that the caller may see and change."""
        return Access(self.tenant, may_change_shared=Scope.ADMIN in self.scopes)


ANYBODY = Caller(None, SHARED, ALL_SCOPES)
"""The caller of every request to a server without keys."""


def caller_of(request: Request) -> Caller:
    """The caller of a request."""
    caller = getattr(request.state, "caller", ANYBODY)
    if not isinstance(caller, Caller):
        raise TypeError("the state of a request holds something else than a caller")
    return caller


async def _caller(request: Request) -> Caller:
    return caller_of(request)


CallerDep = Annotated[Caller, Depends(_caller)]
