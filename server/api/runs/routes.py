"""``/v1/runs``: training runs that ``prelude train --report`` reports."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator
from starlette.responses import Response

from prompt_store.errors import JobNotFoundError
from prompt_store.types import check_name
from server.api.keys.callers import CallerDep, Scope
from server.api.operations import Operation
from server.api.request_body import require_json
from server.api.runs.bodies import (
    PointBody,
    PointList,
    ReportedPoints,
    ReportedRun,
    RunBody,
    RunDeleted,
    RunList,
)
from server.api.services import ServicesDep
from server.errors import InvalidRequestError

router = APIRouter(prefix="/v1/runs", tags=["training runs"])

READERS = {Scope.PROMPTS_READ, Scope.PROMPTS_WRITE}
"""Scopes that may read the runs of their tenant."""

WRITERS = {Scope.PROMPTS_WRITE}

ID_PATTERN = "^[0-9A-Za-z-]+$"

RunId = Annotated[
    str,
    Path(alias="run_id", max_length=64, pattern=ID_PATTERN, description="Id of the run.", examples=["run-0"]),
]
NewRunId = Annotated[
    str,
    Path(
        alias="run_id",
        pattern="^run-[0-9a-f]{32}$",
        description="`run-` and 32 hexadecimal digits, chosen at random by the client.",
        examples=["run-00000000000000000000000000000001"],
    ),
]


@router.put("/{run_id}", dependencies=[Depends(require_json)])
@Operation(
    scopes=WRITERS,
    errors=(404, 503),
    example={
        "prompt_id": "sentiment",
        "method": "prompt_tuning",
        "status": "running",
        "step": 10,
        "num_steps": 100,
        "started_at": 1790000000,
    },
)
async def report_run(run_id: NewRunId, body: ReportedRun, services: ServicesDep, caller: CallerDep) -> RunBody:
    """Report a training: all that is known about it, as often as that changes. The tenant alone sees it."""
    run = body.run(run_id, caller)
    await services.store.call(services.store.runs.put, run)
    return RunBody.of(run)


@router.get("")
@Operation(scopes=READERS, errors=(400, 503))
async def list_runs(
    services: ServicesDep,
    caller: CallerDep,
    prompt_id: Annotated[
        str | None,
        Query(description="Only of this soft prompt or adapter."),
        AfterValidator(lambda name: name and check_name(name, "name")),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Maximum number of entries.")] = 100,
    after: Annotated[
        str | None, Query(max_length=64, pattern=ID_PATTERN, description="Id of the last entry of the page before.")
    ] = None,
) -> RunList:
    """List the tenant's training runs, latest start first."""
    store = services.store
    try:
        found, has_more = await store.call(store.runs.list_all, caller.tenant, prompt_id or None, limit, after)
    except JobNotFoundError as error:
        raise InvalidRequestError(f"after: {error}", param="after") from error
    data = [RunBody.of(run) for run in found]
    return RunList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{run_id}")
@Operation(scopes=READERS, errors=(404, 503))
async def get_run(run_id: RunId, services: ServicesDep, caller: CallerDep) -> RunBody:
    """Get what is known about a training run."""
    return RunBody.of(await services.store.call(services.store.runs.get, run_id, caller.tenant))


@router.post("/{run_id}/metrics", status_code=204, dependencies=[Depends(require_json)])
@Operation(
    scopes=WRITERS,
    errors=(404, 429, 503),
    example={"data": [{"step": 10, "values": {"loss": 1.25, "eval_loss": 1.5, "eval_accuracy": 0.75}}]},
)
async def report_metrics(run_id: RunId, body: ReportedPoints, services: ServicesDep, caller: CallerDep) -> Response:
    """Add metrics of a run. The same points again change nothing."""
    store = services.store
    if body.after_step is not None:
        await store.call(store.runs.truncate, run_id, caller.tenant, body.after_step)
    await store.call(store.runs.add_points, run_id, caller.tenant, body.points())
    return Response(status_code=204)


@router.get("/{run_id}/metrics")
@Operation(scopes=READERS, errors=(404, 503))
async def list_metrics(
    run_id: RunId,
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number of points.")] = 10_000,
    after: Annotated[int, Query(ge=-1, le=2**53, description="Only points of later steps.")] = -1,
) -> PointList:
    """List the metrics of a run, by step."""
    found = await services.store.call(services.store.runs.points, run_id, caller.tenant, after, limit + 1)
    data = [PointBody(step=point.step, values=dict(point.values)) for point in found[:limit]]
    return PointList(data=data, has_more=len(found) > limit, last_step=data[-1].step if data else None)


@router.delete("/{run_id}")
@Operation(scopes=WRITERS, errors=(404, 503))
async def delete_run(run_id: RunId, services: ServicesDep, caller: CallerDep) -> RunDeleted:
    """Delete what is known about a run; a version that it has published stays."""
    await services.store.call(services.store.runs.delete, run_id, caller.tenant)
    return RunDeleted(id=run_id, deleted=True)
