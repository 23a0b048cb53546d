"""The server-sent events of one subscriber.

Each topic is looked at when the last event has been sent, so a slow client gets the newest state, and nothing is
queued for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection

import msgspec
from pydantic import BaseModel

from prompt_store.changes import HistoryFilter
from prompt_store.errors import PromptStoreError
from server.api.batches.bodies import BatchBody
from server.api.batches.runner import BatchRunner
from server.api.evaluations.bodies import EvaluationBody
from server.api.evaluations.routes import READERS as EVALUATION_READERS
from server.api.keys.callers import Caller, Scope
from server.api.live.engine_body import Blocks, Shown
from server.api.monitoring.stats_body import point_body
from server.api.monitoring.subscription import counted
from server.api.runs.bodies import RunBody
from server.api.runs.routes import READERS as RUN_READERS
from server.api.services import Phase, Services
from server.engine.messages import BatchPicture
from server.errors import EngineError

TOPICS: dict[str, frozenset[Scope]] = {
    "live": frozenset(),
    "stats": frozenset(),
    "catalog": frozenset({Scope.PROMPTS_READ}),
    "jobs": frozenset({Scope.GENERATE, Scope.PROMPTS_READ}),
}
"""The topics, each with the scopes of which it needs one, besides one of the route's."""

_TICK_SECONDS = 0.2
_POOL_SECONDS = 1.0
_JOBS_SECONDS = 2.0
_MAX_NAMES = 64

_encoder = msgspec.json.Encoder()

Job = BatchBody | EvaluationBody | RunBody


EVENTS = (
    "Server-sent events. `server`: `phase`, `reason` and `since`. `live`: as `GET /v1/engine`, without the map of "
    "blocks, at most five a second. `pool`: its `blocks` with the map, at most one a second. `stats`: the newest "
    "point of `GET /v1/stats`. `catalog`: `id` of a changed soft prompt with its last change, or null if any may "
    "have changed. `job`: a batch, an evaluation or a training run whose state has changed; `object` says which."
)
"""The events in words, for the OpenAPI document."""


class ServerState(msgspec.Struct, kw_only=True):
    """The data of ``server`` events."""

    phase: Phase
    reason: str | None
    since: int


class Changed(msgspec.Struct, kw_only=True):
    """The data of ``catalog`` events."""

    id: str | None
    action: str | None = None
    version: int | None = None
    alias: str | None = None


class Subscriber:
    """One client of ``/v1/events``.

    Args:
        services: The server.
        caller: Whose view it is.
        topics: Some of ``TOPICS``.
        take_picture: Returns the batch; None if the engine cannot show it.
        is_current: Whether the caller's key or session is still valid.
        batches: The batches of all tenants.
    """

    def __init__(
        self,
        services: Services,
        caller: Caller,
        topics: Collection[str],
        take_picture: Callable[[], Awaitable[BatchPicture | None]],
        is_current: Callable[[], bool],
        batches: BatchRunner,
    ) -> None:
        self._services = services
        self._caller = caller
        self._topics = topics
        self._take_picture = take_picture
        self._is_current = is_current
        self._batches = batches
        self._state: ServerState | None = None
        self._live: Shown | None = None
        self._blocks: Blocks | None = None
        self._pool_at = 0.0
        self._jobs_at = 0.0
        self._point_at = 0.0
        self._position = services.catalog_changes.position
        self._jobs: dict[str, Job] | None = None
        self._began = time.time()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield events until the caller is no longer valid, or the server drains."""
        with counted(self._services):
            while True:
                for name, data in await self._news():
                    yield _frame(name, data)
                if not self._is_current() or self._services.status.phase is Phase.DRAINING:
                    return
                await asyncio.sleep(_TICK_SECONDS)

    async def _news(self) -> list[tuple[str, object]]:
        found: list[tuple[str, object]] = []
        status = self._services.status
        state = ServerState(phase=status.phase, reason=status.reason, since=int(status.since))
        if state != self._state:
            self._state = state
            found.append(("server", state))
        now = time.monotonic()
        if "live" in self._topics and status.reason is None:
            found += await self._look(now)
        if "stats" in self._topics and self._services.load.points:
            point = self._services.load.points[-1]
            if point.at > self._point_at:
                self._point_at = point.at
                found.append(("stats", point_body([point])))
        if "catalog" in self._topics:
            found += [("catalog", changed) for changed in await self._changes()]
        if "jobs" in self._topics and now - self._jobs_at >= _JOBS_SECONDS:
            self._jobs_at = now
            found += [("job", job) for job in await self._changed_jobs()]
        return found

    async def _look(self, now: float) -> list[tuple[str, object]]:
        services, tenant = self._services, self._caller.tenant
        try:
            picture = await self._take_picture()
        except EngineError:
            return []  # a server event says why
        found: list[tuple[str, object]] = []
        shown = services.shown_pictures.show(services.engine.stats, picture, services.names, tenant)
        if now - self._pool_at >= _POOL_SECONDS:
            self._pool_at = now
            if shown.blocks != self._blocks:
                self._blocks = shown.blocks
                found.append(("pool", shown.blocks))
        if not shown.is_as(self._live):
            self._live = shown
            found.append(("live", msgspec.Raw(shown.json)))
        return found

    async def _changes(self) -> list[Changed]:
        changes = self._services.catalog_changes
        if changes.position == self._position:
            return []
        names, self._position = changes.since(self._position), changes.position
        if names is None or len(names) > _MAX_NAMES:
            return [Changed(id=None)]
        store, found = self._services.store, []
        for name in sorted(names):
            only = HistoryFilter(name=name)
            try:
                entries, _ = await store.call(store.registry.list_history, only, 1, None, self._caller.access)
            except PromptStoreError:
                return [Changed(id=None)]
            found += [
                Changed(id=name, action=entry.action, version=entry.version, alias=entry.alias) for entry in entries
            ]
        return found

    async def _changed_jobs(self) -> list[Job]:
        """The jobs that the caller may see and whose state has changed; at the first call no batches."""
        scopes, tenant, store = self._caller.scopes, self._caller.tenant, self._services.store
        found: list[Job] = []
        try:
            if Scope.GENERATE in scopes:
                records = await store.call(self._batches.storage.batches, tenant)
                found += [BatchBody.of(self._batches.current(record)) for record in records]
            if scopes & EVALUATION_READERS:
                evaluations = await store.call(store.evaluations.changed, tenant, self._began)
                found += [EvaluationBody.of(evaluation) for evaluation in evaluations]
            if scopes & RUN_READERS:
                runs = await store.call(store.runs.changed, tenant, self._began)
                found += [RunBody.of(run) for run in runs]
        except PromptStoreError:
            return []  # the next look finds what has changed
        before = self._jobs
        if before is None:
            before = {job.id: job for job in found if isinstance(job, BatchBody)}
        self._jobs = {job.id: job for job in found}
        return [job for job in found if before.get(job.id) != job]


def _frame(name: str, data: object) -> bytes:
    body = data.model_dump_json().encode() if isinstance(data, BaseModel) else _encoder.encode(data)
    return b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"
