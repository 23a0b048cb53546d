"""The caller of a request: tenant and scopes of its API key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from prompt_store.changes import Actor
from prompt_store.types import SHARED, Access
from server.api.keys.limits import KeyLimiter, Limits


class Scope(StrEnum):
    """A permission of an API key."""

    GENERATE = "generate"
    PROMPTS_READ = "prompts:read"
    PROMPTS_WRITE = "prompts:write"
    ADMIN = "admin"


IN_PROCESS_CALLER = "prelude.caller"
"""Key of an ASGI scope: the caller of a request that the server sends to itself. No client can set it."""

ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    Attributes:
        name: Name of the key in records, which does not reveal the key; None without keys.
        tenant: Owner of soft prompts, cached texts and turns in the queue; ``SHARED`` without keys.
        scopes: Permissions of the key.
        limiter: Enforces the limits of the key.
        key_name: The name that the key file gives the key, if any.
    """

    name: str | None
    tenant: str
    scopes: frozenset[Scope]
    limiter: KeyLimiter = field(default_factory=lambda: KeyLimiter(Limits()), compare=False)
    key_name: str | None = None

    def actor(self, reason: str | None = None) -> Actor:
        """The caller as the author of a change."""
        return Actor(self.name, self.key_name, reason)

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


def is_current(request: Request) -> Callable[[], bool]:
    """Says whether the key or the session of a request is still valid, for responses that last."""
    check: Callable[[], bool] = getattr(request.state, "is_current", lambda: True)
    return check


async def _caller(request: Request) -> Caller:
    return caller_of(request)


CallerDep = Annotated[Caller, Depends(_caller)]
