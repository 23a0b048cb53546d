"""Queries and changes of training runs. All functions take an open connection of the catalog."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from prompt_store.catalog.schema import training_points, training_runs
from prompt_store.errors import JobNotFoundError, JobsFullError
from prompt_store.jobs.types import RunPoint, RunStatus, TrainingRun

MAX_RUNS = 1000
"""Runs of one tenant; the one that was updated longest ago is deleted for a new one."""

MAX_POINTS = 50_000
"""Steps of one run with metrics."""


def put(connection: sa.Connection, run: TrainingRun) -> bool:
    """Insert a run, or replace what is known about it; returns whether it is new.

    Raises:
        JobNotFoundError: If another tenant has a run with this id.
    """
    owner = connection.execute(
        sa.select(training_runs.c.owner).where(training_runs.c.id == run.id).with_for_update()
    ).scalar_one_or_none()
    result = {
        "scores": run.scores,
        "golden_check": run.golden_check,
        "alias": run.alias,
        "failure": run.failure,
        "warnings": list(run.warnings),
        "best_step": run.best_step,
    }
    values: dict[str, Any] = {
        "key": run.key,
        "name": run.name,
        "method": run.method,
        "base": run.base,
        "status": run.status.value,
        "step": run.step,
        "num_steps": run.num_steps,
        "settings": json.dumps(run.settings),
        "result": json.dumps(result),
        "version": run.version,
        "started_at": run.started_at,
        "updated_at": run.updated_at,
        "finished_at": run.finished_at,
    }
    if owner is not None:
        if owner != run.owner:
            raise _not_found(run.id)
        connection.execute(training_runs.update().where(training_runs.c.id == run.id).values(values))
        return False
    _make_room(connection, run.owner)
    connection.execute(training_runs.insert().values(id=run.id, owner=run.owner, **values))
    return True


def get(connection: sa.Connection, run_id: str, owner: str) -> TrainingRun:
    """A run; JobNotFoundError if there is none, or it is another tenant's."""
    row = connection.execute(sa.select(training_runs).where(training_runs.c.id == run_id)).one_or_none()
    if row is None or row.owner != owner:
        raise _not_found(run_id)
    return _run(row)


def list_all(
    connection: sa.Connection, owner: str, name: str | None, limit: int, after: str | None
) -> tuple[list[TrainingRun], bool]:
    """Runs of a tenant, latest start first, after the one with the id ``after``; and whether there are more.

    Raises:
        JobNotFoundError: If there is no run ``after``.
    """
    column = training_runs.c
    query = sa.select(training_runs).where(column.owner == owner)
    if name is not None:
        query = query.where(column.name == name)
    if after is not None:
        last = get(connection, after, owner)
        position = sa.tuple_(column.started_at, column.id)
        query = query.where(position < sa.tuple_(sa.literal(last.started_at), sa.literal(last.id)))
    rows = connection.execute(query.order_by(column.started_at.desc(), column.id.desc()).limit(limit + 1)).all()
    return [_run(row) for row in rows[:limit]], len(rows) > limit


def changed(connection: sa.Connection, owner: str, since: int, limit: int) -> list[TrainingRun]:
    """The newest runs of a tenant that were reported at a time or later (microseconds, UTC)."""
    column = training_runs.c
    query = sa.select(training_runs).where(column.owner == owner, column.updated_at >= since)
    return [_run(row) for row in connection.execute(query.order_by(column.started_at.desc()).limit(limit))]


def add_points(
    connection: sa.Connection, run_id: str, owner: str, points: Sequence[RunPoint], at: int, *, is_postgresql: bool
) -> None:
    """Add metrics of a run; a step that is known gets the new numbers beside its others.

    Args:
        connection: A transaction.
        run_id: The run.
        owner: The tenant.
        points: Metrics, at most one point a step.
        at: The time.
        is_postgresql: The kind of database.

    Raises:
        JobNotFoundError: As ``get``.
        JobsFullError: If the run would have too many points.
    """
    column = training_points.c
    run = get(connection, run_id, owner)
    steps = [point.step for point in points]
    known = {
        row.step: json.loads(row.numbers)
        for row in connection.execute(
            sa.select(column.step, column.numbers).where(column.run_id == run_id, column.step.in_(steps))
        )
    }
    count = connection.execute(sa.select(sa.func.count()).where(column.run_id == run_id)).scalar_one()
    if count + len(points) - len(known) > MAX_POINTS:
        raise JobsFullError(f"the run {run_id} has metrics of {count} steps already, of at most {MAX_POINTS}")
    insert = (postgresql.insert if is_postgresql else sqlite.insert)(training_points)
    statement = insert.on_conflict_do_update(
        index_elements=[column.run_id, column.step], set_={"numbers": insert.excluded.numbers}
    )
    values = [
        {
            "run_id": run_id,
            "step": point.step,
            "numbers": json.dumps(known.get(point.step, {}) | dict(point.values)),
        }
        for point in sorted(points, key=lambda point: point.step)
    ]
    connection.execute(statement, values)
    connection.execute(
        training_runs.update().where(training_runs.c.id == run_id).values(updated_at=at, step=max(run.step, *steps))
    )


def points_of(connection: sa.Connection, run_id: str, owner: str, after: int, limit: int) -> list[RunPoint]:
    """The metrics of a run beyond a step, in order, at most ``limit``. Raises JobNotFoundError as ``get`` does."""
    get(connection, run_id, owner)
    column = training_points.c
    query = sa.select(column.step, column.numbers).where(column.run_id == run_id, column.step > after)
    rows = connection.execute(query.order_by(column.step).limit(limit))
    return [RunPoint(row.step, json.loads(row.numbers)) for row in rows]


def delete(connection: sa.Connection, run_id: str, owner: str) -> None:
    """Delete what is known about a run. Raises JobNotFoundError as ``get`` does."""
    get(connection, run_id, owner)
    _delete(connection, run_id)


def truncate(connection: sa.Connection, run_id: str, owner: str, step: int) -> None:
    """Drop the metrics after a step, from which the training resumes. Raises JobNotFoundError as ``get`` does."""
    get(connection, run_id, owner)
    column = training_points.c
    connection.execute(training_points.delete().where(column.run_id == run_id, column.step > step))


def _delete(connection: sa.Connection, run_id: str) -> None:
    connection.execute(training_points.delete().where(training_points.c.run_id == run_id))
    connection.execute(training_runs.delete().where(training_runs.c.id == run_id))


def _make_room(connection: sa.Connection, owner: str) -> None:
    column = training_runs.c
    query = sa.select(column.id).where(column.owner == owner).order_by(column.updated_at.desc(), column.id)
    for run_id in connection.execute(query.offset(MAX_RUNS - 1)).scalars().all():
        _delete(connection, run_id)


def _not_found(run_id: str) -> JobNotFoundError:
    return JobNotFoundError(f"the run {run_id[:64]!r} does not exist")


def _run(row: Any) -> TrainingRun:
    result = json.loads(row.result)
    return TrainingRun(
        id=row.id,
        owner=row.owner,
        key=row.key,
        name=row.name,
        method=row.method,
        base=row.base,
        status=RunStatus(row.status),
        step=row.step,
        num_steps=row.num_steps,
        settings=json.loads(row.settings),
        scores=result["scores"],
        golden_check=result["golden_check"],
        version=row.version,
        alias=result["alias"],
        failure=result["failure"],
        warnings=tuple(result["warnings"]),
        best_step=result["best_step"],
        started_at=row.started_at,
        updated_at=row.updated_at,
        finished_at=row.finished_at,
    )
