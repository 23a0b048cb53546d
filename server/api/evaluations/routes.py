"""``/v1/evaluations``: evaluations that the server keeps, and their comparison."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator
from starlette.requests import Request
from starlette.responses import Response

from prompt_store.errors import JobNotFoundError, StoreUnavailableError
from prompt_store.jobs.types import EvaluationFilter, EvaluationStatus, Outcome
from prompt_store.types import check_name
from server.api.evaluations.bodies import (
    DifferingRow,
    EvaluationBody,
    EvaluationComparison,
    EvaluationDeleted,
    EvaluationList,
    NewEvaluation,
    RowBody,
    RowList,
)
from server.api.evaluations.creation import create
from server.api.evaluations.runner import EvaluationRunner
from server.api.http.sse import named_events
from server.api.keys.callers import Caller, CallerDep, Scope, is_current
from server.api.monitoring.subscription import counted, subscription
from server.api.operations import Operation, Quota
from server.api.request_body import require_json
from server.api.services import Phase, Services, ServicesDep
from server.errors import InvalidRequestError
from server.evaluation.significance import compare

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])

READERS = {Scope.GENERATE, Scope.PROMPTS_READ}
"""Scopes that may read the evaluations of their tenant."""

_POLL_SECONDS = 0.5

_EVENTS = named_events("Events `evaluation`, each with the evaluation as JSON.")

ID_PATTERN = "^[0-9A-Za-z-]+$"

EvaluationId = Annotated[
    str,
    Path(
        alias="evaluation_id",
        max_length=64,
        pattern=ID_PATTERN,
        description="Id of the evaluation.",
        examples=["eval-0"],
    ),
]
After = Annotated[
    str | None, Query(max_length=64, pattern=ID_PATTERN, description="Id of the last entry of the page before.")
]
Limit = Annotated[int, Query(ge=1, le=500, description="Maximum number of entries.")]
AfterRow = Annotated[int, Query(ge=-1, le=2**31 - 1, description="Only rows with a higher number.")]


async def _runner(request: Request) -> EvaluationRunner:
    runner = request.app.state.evaluations
    if not isinstance(runner, EvaluationRunner):
        raise TypeError("the application was not made by create_app")
    return runner


RunnerDep = Annotated[EvaluationRunner, Depends(_runner)]


@router.post("", status_code=201, dependencies=[Depends(require_json)])
@Operation(
    scopes={Scope.GENERATE},
    errors=(404, 429, 503),
    quota=Quota.REQUESTS,
    example={
        "model": "sentiment",
        "dataset": "test.jsonl",
        "data": '{"text": "The strap is flimsy.", "label": "negative"}\n{"text": "I love it", "label": "positive"}',
    },
)
async def create_evaluation(
    body: NewEvaluation, services: ServicesDep, caller: CallerDep, runner: RunnerDep
) -> EvaluationBody:
    """Keep an evaluation: of `data`, which is answered here in the service tier `batch`, or of finished `rows`.

    An alias means the version that it points at now. The tenant alone sees the evaluation. Labels and outcomes of
    rows are kept, texts only with `keep_texts`.
    """
    evaluation = await create(services, caller, body)
    runner.notify()
    return EvaluationBody.of(evaluation, is_whole=True)


@router.get("")
@Operation(scopes=READERS, errors=(400, 503))
async def list_evaluations(
    services: ServicesDep,
    caller: CallerDep,
    prompt_id: Annotated[
        str | None,
        Query(description="Only of this soft prompt or adapter."),
        AfterValidator(lambda name: name and check_name(name, "name")),
    ] = None,
    version: Annotated[int | None, Query(ge=1, le=2**31, description="Only of this version.")] = None,
    model: Annotated[
        str | None, Query(max_length=300, pattern="^[ -~]+$", description="Only of exactly this model.")
    ] = None,
    dataset_digest: Annotated[
        str | None, Query(pattern="^[0-9a-f]{64}$", description="Only on the data with this SHA-256.")
    ] = None,
    status: Annotated[EvaluationStatus | None, Query(description="Only in this state.")] = None,
    limit: Limit = 100,
    after: After = None,
) -> EvaluationList:
    """List the tenant's evaluations, newest first, without scores by label."""
    only = EvaluationFilter(
        prompt=prompt_id or None,
        version=version,
        model=model,
        dataset_digest=dataset_digest,
        status=status,
    )
    store = services.store
    try:
        found, has_more = await store.call(store.evaluations.list_all, caller.tenant, only, limit, after)
    except JobNotFoundError as error:
        raise InvalidRequestError(f"after: {error}", param="after") from error
    data = [EvaluationBody.of(one) for one in found]
    return EvaluationList(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{evaluation_id}")
@Operation(scopes=READERS, errors=(404, 503))
async def get_evaluation(evaluation_id: EvaluationId, services: ServicesDep, caller: CallerDep) -> EvaluationBody:
    """Get an evaluation with its progress and all scores."""
    store = services.store
    found = await store.call(store.evaluations.get, evaluation_id, caller.tenant)
    return EvaluationBody.of(found, is_whole=True)


@router.get("/{evaluation_id}/rows")
@Operation(scopes=READERS, errors=(404, 503))
async def list_rows(
    evaluation_id: EvaluationId,
    services: ServicesDep,
    caller: CallerDep,
    outcome: Annotated[Outcome | None, Query(description="Only rows with this outcome.")] = None,
    limit: Limit = 100,
    after: AfterRow = -1,
) -> RowList:
    """List the rows of an evaluation with their outcomes, in order; texts only if they are kept."""
    store = services.store
    evaluation = await store.call(store.evaluations.get, evaluation_id, caller.tenant)
    rows = await store.call(
        store.evaluations.rows, evaluation_id, caller.tenant, outcome=outcome, after=after, limit=limit + 1
    )
    shows_text = bool(evaluation.settings["keep_texts"])
    data = [RowBody.of(number, row, shows_text=shows_text) for number, row in list(rows.items())[:limit]]
    return RowList(data=data, has_more=len(rows) > limit, last_row=data[-1].row if data else None)


@router.get("/{evaluation_id}/comparison")
@Operation(scopes=READERS, errors=(404, 503))
async def compare_evaluations(
    evaluation_id: EvaluationId,
    services: ServicesDep,
    caller: CallerDep,
    to: Annotated[
        str,
        Query(max_length=64, pattern=ID_PATTERN, description="Id of another completed evaluation on the same data."),
    ],
    right: Annotated[
        Literal["first", "second"] | None, Query(description="Only rows that this one alone answers correctly.")
    ] = None,
    limit: Limit = 100,
    after: AfterRow = -1,
) -> EvaluationComparison:
    """Compare two completed evaluations on the same data, row by row: difference, interval, McNemar's test.

    `data` are the rows that only one of the two answers correctly.
    """
    return await services.store.call(_compared, services, caller, evaluation_id, to, right, limit, after)


@router.get("/{evaluation_id}/events", response_class=Response, responses={200: {"content": _EVENTS}})
@Operation(scopes=READERS, errors=(404, 429, 503))
async def stream_evaluation(
    evaluation_id: EvaluationId, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Stream an evaluation as it progresses, as server-sent events, until it is over."""
    store = services.store
    await store.call(store.evaluations.get, evaluation_id, caller.tenant)
    check = is_current(request)

    async def events() -> AsyncGenerator[bytes, None]:
        last = None
        with counted(services):
            while check() and services.status.phase is not Phase.DRAINING:
                try:
                    found = await store.call(store.evaluations.get, evaluation_id, caller.tenant)
                except StoreUnavailableError:
                    await asyncio.sleep(_POLL_SECONDS)
                    continue
                except JobNotFoundError:
                    return  # deleted meanwhile
                if found != last:
                    last = found
                    body = EvaluationBody.of(found, is_whole=found.status.is_over)
                    yield b"event: evaluation\ndata: " + body.model_dump_json().encode() + b"\n\n"
                if found.status.is_over:
                    return
                await asyncio.sleep(_POLL_SECONDS)

    return subscription(request, services, events())


@router.post("/{evaluation_id}/cancel")
@Operation(scopes={Scope.GENERATE}, errors=(404, 503))
async def cancel_evaluation(
    evaluation_id: EvaluationId, services: ServicesDep, caller: CallerDep, runner: RunnerDep
) -> EvaluationBody:
    """End an evaluation early; the outcomes so far are kept, without scores."""
    store = services.store
    found = await store.call(store.evaluations.cancel, evaluation_id, caller.tenant)
    runner.notify()
    return EvaluationBody.of(found, is_whole=True)


@router.delete("/{evaluation_id}")
@Operation(scopes={Scope.GENERATE}, errors=(404, 409, 503))
async def delete_evaluation(
    evaluation_id: EvaluationId, services: ServicesDep, caller: CallerDep
) -> EvaluationDeleted:
    """Delete an evaluation that is over."""
    store = services.store
    await store.call(store.evaluations.delete, evaluation_id, caller.tenant)
    return EvaluationDeleted(id=evaluation_id, deleted=True)


def _compared(
    services: Services,
    caller: Caller,
    first_id: str,
    second_id: str,
    right: Literal["first", "second"] | None,
    limit: int,
    after: int,
) -> EvaluationComparison:
    """The comparison; it blocks."""
    evaluations, owner = services.store.evaluations, caller.tenant
    first, second = (evaluations.get(found, owner) for found in (first_id, second_id))
    for one in (first, second):
        if one.status is not EvaluationStatus.COMPLETED:
            raise InvalidRequestError(f"to: the evaluation {one.id} is {one.status}, not completed", param="to")
    if (first.dataset_digest, first.metric, first.total) != (second.dataset_digest, second.metric, second.total):
        raise InvalidRequestError(
            f"to: {second.id} is on other data than {first.id}; only answers to the same rows can be compared",
            param="to",
        )
    ours = [row.outcome is Outcome.RIGHT for row in evaluations.outcomes(first.id, owner)]
    theirs = [row.outcome is Outcome.RIGHT for row in evaluations.outcomes(second.id, owner)]
    found = compare(ours, theirs)
    wanted = {True: "first", False: "second"}
    numbers = [
        number
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True))
        if number > after and our != their and right in (None, wanted[our])
    ]
    shown = numbers[:limit]
    left, other = (evaluations.rows_by_number(one.id, owner, shown) for one in (first, second))
    data = [
        DifferingRow(
            row=number,
            line=left[number].line,
            right="first" if ours[number] else "second",
            expected=left[number].expected or other[number].expected,
            first_answer=left[number].answer,
            second_answer=other[number].answer,
            text=left[number].text or other[number].text,
        )
        for number in shown
    ]
    return EvaluationComparison(
        first=EvaluationBody.of(first, is_whole=True),
        second=EvaluationBody.of(second, is_whole=True),
        rows=found.num_rows,
        both_right=found.both_right,
        only_first=found.only_first,
        only_second=found.only_second,
        both_wrong=found.both_wrong,
        difference=found.difference,
        interval=found.interval,
        p_value=found.p_value,
        data=data,
        has_more=len(numbers) > limit,
        last_row=shown[-1] if shown else None,
    )
