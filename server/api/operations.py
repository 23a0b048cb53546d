"""The facts of each route in one place, and the lookup of a request's route."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, compile_path
from starlette.types import Scope as AsgiScope

from server.api.keys.callers import Caller, Scope
from server.errors import PermissionDeniedError

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

ANY_KEY: frozenset[Scope] = frozenset()
"""Scopes of an operation that every API key may use."""

_ATTRIBUTE = "operation"
"""Attribute of an endpoint that holds its operation."""


class Quota(StrEnum):
    """The limits of an API key that a request counts against."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    """Requests and tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """The facts of one route, declared on its endpoint: ``@Operation(...)`` below the decorator of the route.

    Attributes:
        scopes: An API key needs one of them; any key is enough if there are none. None: no key is needed.
        errors: Statuses of errors, besides those that follow from ``scopes``, parameters and the request body.
        is_probe: Whether it is requested periodically to see whether the server works.
        is_metrics: Whether ``--open-metrics`` serves it without an API key.
        quota: Limits of the API key that a request counts against.
        work: OpenTelemetry's ``gen_ai.operation.name``, for requests that the model works on. They are refused before
            validation while the queue is too long.
        takes_token_ids: Whether the body may hold texts as token ids, and so more JSON values than others.
        is_upload: Whether the endpoint reads and bounds the body itself.
        example: An example body, valid for the demo's soft prompts.
        reply: The JSON response, where FastAPI does not know it.
        event: The JSON in each event of a stream.
    """

    scopes: AbstractSet[Scope] | None
    errors: Collection[int] = (503,)
    is_probe: bool = False
    is_metrics: bool = False
    quota: Quota | None = None
    work: str | None = None
    takes_token_ids: bool = False
    is_upload: bool = False
    example: Mapping[str, object] | None = None
    reply: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        """Declare this on an endpoint."""
        setattr(endpoint, _ATTRIBUTE, self)
        return endpoint


@dataclass(frozen=True, slots=True)
class Matched:
    """The match of a request's method and path.

    Attributes:
        operation: The operation; None if the path has none for this method.
        by_method: All operations of the path; empty for an unknown path.
        route: The template of the path, such as ``/v1/prompts/{id}``; None for an unknown path.
    """

    operation: Operation | None
    by_method: Mapping[str, Operation]
    route: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the path needs no API key; a wrong method needs none either."""
        return any(operation.scopes is None for operation in self.by_method.values())

    @property
    def is_polled(self) -> bool:
        """Whether the path is for probes or metrics, which are requested periodically."""
        return self.is_metrics or any(operation.is_probe for operation in self.by_method.values())

    @property
    def is_metrics(self) -> bool:
        """Whether ``--open-metrics`` serves the path without an API key."""
        return any(operation.is_metrics for operation in self.by_method.values())

    def check_access(self, caller: Caller) -> None:
        """Check that a caller may use the operation.

        Raises:
            PermissionDeniedError: If the key has none of the required scopes.
            HTTPException: 404 or 405 if there is no such operation.
        """
        if not self.by_method:
            raise HTTPException(404)
        if self.operation is None:
            raise HTTPException(405, headers={"allow": ", ".join(sorted(self.by_method))})
        needed = self.operation.scopes
        if needed and not needed & caller.scopes:
            words = " or ".join(sorted(needed))
            raise PermissionDeniedError(f"this requires an API key with the scope {words}", scopes=sorted(needed))


class Operations:
    """The operations of all routes.

    Attributes:
        by_route: Operations by method and path template.

    Args:
        routes: Everything that is served.

    Raises:
        TypeError: If a route has no operation.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self.by_route: dict[tuple[str, str], Operation] = {}
        by_path: dict[str, dict[str, Operation]] = {}
        for route in routes:
            path, methods, operation = _declared(route)
            for method in methods:
                self.by_route[method, path] = by_path.setdefault(path, {})[method] = operation
        self._patterns = [(compile_path(path)[0], path, by_method) for path, by_method in by_path.items()]

    def match(self, method: str, path: str) -> Matched:
        """Find the operation of a request."""
        by_method: dict[str, Operation] = {}
        route = None
        for pattern, template, operations in self._patterns:
            if pattern.match(path):
                if route is None or (method in operations and method not in by_method):
                    route = template
                by_method = operations | by_method  # the first route answers, as in Starlette
        return Matched(by_method.get(method), by_method, route)


def _declared(route: BaseRoute) -> tuple[str, list[str], Operation]:
    found = getattr(getattr(route, "endpoint", None), _ATTRIBUTE, None)
    if not isinstance(route, Route) or not isinstance(found, Operation):
        raise TypeError(f"{route!r} has no operation: add @Operation(...) to its endpoint")
    return route.path, sorted(route.methods or ()), found


def matched(scope: AsgiScope) -> Matched:
    """The match of a request, found by ``RequestIdMiddleware``."""
    found = scope["state"]["matched"]
    if not isinstance(found, Matched):
        raise TypeError("the state of a request holds something else than its operation")
    return found
