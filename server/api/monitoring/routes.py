"""``/v1/engine``, ``/v1/stats`` and ``/v1/events``: the batch and the load, once or as they change."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from server.api.batches.runner import BatchRunner
from server.api.http.sse import named_events
from server.api.keys.callers import Caller, CallerDep, Scope, is_current
from server.api.live.engine_body import EngineBody, engine_body
from server.api.load import MAX_POINTS, POINT_SECONDS
from server.api.monitoring.events import EVENTS, TOPICS, Subscriber
from server.api.monitoring.stats_body import Stats, stats_body
from server.api.monitoring.subscription import subscription
from server.api.operations import Operation
from server.api.services import Services, ServicesDep
from server.engine.messages import BatchPicture
from server.errors import InvalidRequestError, PermissionDeniedError, UnsupportedByEngineError

router = APIRouter(prefix="/v1", tags=["server"])

WATCHERS = {Scope.GENERATE, Scope.PROMPTS_READ, Scope.ADMIN}
"""Scopes that may watch: each sees its tenant's rows and shared soft prompts."""

_EVENT_CONTENT = named_events(EVENTS)
_HOUR = MAX_POINTS * POINT_SECONDS


@router.get("/engine", response_class=Response)
@Operation(scopes=WATCHERS, errors=(503,), reply=EngineBody)
async def get_engine(services: ServicesDep, caller: CallerDep) -> Response:
    """Get the running batch as it is now: sequences, soft prompts on the device and blocks. It holds no text.

    Rows of other tenants have no name, for admins too.
    """
    services.require_ready()
    picture = await picture_of(services)
    body = engine_body(services.engine.stats, picture, services.names, caller.tenant)
    return Response(msgspec.json.encode(body), media_type="application/json")


@router.get("/stats", response_class=Response)
@Operation(scopes=WATCHERS, errors=(), reply=Stats)
async def get_stats(
    services: ServicesDep,
    caller: CallerDep,
    window: Annotated[int, Query(ge=POINT_SECONDS, le=_HOUR, description="Seconds before now to return.")] = _HOUR,
    step: Annotated[
        int,
        Query(
            ge=POINT_SECONDS,
            le=_HOUR,
            multiple_of=POINT_SECONDS,
            description=f"Seconds of one point, a multiple of {POINT_SECONDS}.",
        ),
    ] = POINT_SECONDS,
) -> Response:
    """Get the load of the last hour at most: tokens, sequences, blocks, latencies, outcomes and errors."""
    body = stats_body(services.load, caller.tenant, window=window, step=step, now=time.time())
    return Response(msgspec.json.encode(body), media_type="application/json")


@router.get("/events", response_class=Response, responses={200: {"content": _EVENT_CONTENT}})
@Operation(scopes=WATCHERS, errors=(429,))
async def stream_events(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    topics: Annotated[
        str | None,
        Query(
            max_length=64,
            description=f"Comma-separated: {', '.join(TOPICS)}; default: all that the key may see.",
            examples=["live,stats"],
        ),
    ] = None,
) -> Response:
    """Stream what changes, as server-sent events: the batch, the load and changed soft prompts.

    The stream ends with the session or the key, and when the server drains. A client that reads slowly gets the
    newest state and misses what was between.
    """
    chosen = _choose(topics, caller)
    subscriber = Subscriber(
        services, caller, chosen, lambda: picture_of(services), is_current(request), _runner(request)
    )
    return subscription(request, services, subscriber.events())


def _choose(topics: str | None, caller: Caller) -> set[str]:
    """The requested topics, or all that a caller may see.

    Raises:
        InvalidRequestError: If one is unknown.
        PermissionDeniedError: If the key lacks the scope of one.
    """
    may_see = {topic for topic, scopes in TOPICS.items() if not scopes or scopes & caller.scopes}
    if topics is None:
        return may_see
    chosen = {topic.strip() for topic in topics.split(",")}
    for topic in sorted(chosen - may_see):
        scopes = sorted(TOPICS.get(topic, ()))
        if not scopes:
            raise InvalidRequestError(f"topics: must be some of {', '.join(TOPICS)}, not {topic!r}", param="topics")
        words = " or ".join(scopes)
        raise PermissionDeniedError(f"topics: {topic} requires an API key with the scope {words}", scopes=scopes)
    return chosen


def _runner(request: Request) -> BatchRunner:
    runner = request.app.state.batches
    if not isinstance(runner, BatchRunner):
        raise TypeError("the application was not made by create_app")
    return runner


async def picture_of(services: Services) -> BatchPicture | None:
    """The batch; None if the engine cannot show it."""
    try:
        return await services.engine.look()
    except UnsupportedByEngineError:
        return None
