"""Queries and changes of evaluations. All functions take an open connection of the catalog."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from prompt_store.catalog.schema import evaluation_rows, evaluations
from prompt_store.errors import JobNotFoundError, JobsFullError, PromptConflictError
from prompt_store.jobs.types import Evaluation, EvaluationFilter, EvaluationRow, EvaluationStatus, Outcome

MAX_EVALUATIONS = 1000
"""Evaluations of one tenant; the oldest one that is over is deleted for a new one."""

MAX_WAITING = 64
"""Evaluations of one tenant that are not over."""

MAX_TENANT_BYTES = 512 * 1024**2
"""Bytes of the texts of all evaluations of one tenant."""

_OVER = [status.value for status in EvaluationStatus if status.is_over]
_RECORD_COLUMNS = [column for column in evaluations.c if column.name not in ("num_bytes", "runner", "leased_until")]


def add(connection: sa.Connection, evaluation: Evaluation, rows: Sequence[EvaluationRow]) -> None:
    """Insert an evaluation with its rows; the oldest ones make room for it.

    Raises:
        JobsFullError: If too many evaluations of the tenant are not over, or there is no room for the texts.
    """
    num_bytes = sum(_size(row) for row in rows)
    _make_room(connection, evaluation, num_bytes)
    connection.execute(
        evaluations.insert().values(
            id=evaluation.id,
            owner=evaluation.owner,
            key=evaluation.key,
            name=evaluation.name,
            model=evaluation.model,
            prompt=evaluation.prompt,
            version=evaluation.version,
            is_recorded=evaluation.is_recorded,
            status=evaluation.status.value,
            dataset=evaluation.dataset,
            dataset_digest=evaluation.dataset_digest,
            metric=evaluation.metric,
            settings=json.dumps(evaluation.settings),
            total=evaluation.total,
            num_right=evaluation.right,
            num_errors=evaluation.errors,
            num_answered=evaluation.answered,
            scores=None if evaluation.scores is None else json.dumps(evaluation.scores),
            failure=evaluation.failure,
            num_bytes=num_bytes,
            created_at=evaluation.created_at,
            started_at=evaluation.started_at,
            finished_at=evaluation.finished_at,
        )
    )
    values = [_row_values(evaluation.id, number, row) for number, row in enumerate(rows)]
    connection.execute(evaluation_rows.insert(), values)


def get(connection: sa.Connection, evaluation_id: str, owner: str | None) -> Evaluation:
    """An evaluation; JobNotFoundError if there is none, or it is another tenant's. An owner of None sees all."""
    query = sa.select(*_RECORD_COLUMNS).where(evaluations.c.id == evaluation_id)
    row = connection.execute(query).one_or_none()
    if row is None or owner not in (None, row.owner):
        raise JobNotFoundError(f"the evaluation {evaluation_id[:64]!r} does not exist")
    return _evaluation(row)


def list_all(
    connection: sa.Connection, owner: str, only: EvaluationFilter, limit: int, after: str | None
) -> tuple[list[Evaluation], bool]:
    """Evaluations of a tenant, newest first, after the one with the id ``after``; and whether there are more.

    Raises:
        JobNotFoundError: If there is no evaluation ``after``.
    """
    query = sa.select(*_RECORD_COLUMNS).where(evaluations.c.owner == owner)
    for column, value in (
        (evaluations.c.prompt, only.prompt),
        (evaluations.c.version, only.version),
        (evaluations.c.model, only.model),
        (evaluations.c.dataset_digest, only.dataset_digest),
        (evaluations.c.status, None if only.status is None else only.status.value),
    ):
        if value is not None:
            query = query.where(column == value)
    if after is not None:
        last = get(connection, after, owner)
        position = sa.tuple_(evaluations.c.created_at, evaluations.c.id)
        query = query.where(position < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
    query = query.order_by(evaluations.c.created_at.desc(), evaluations.c.id.desc()).limit(limit + 1)
    rows = connection.execute(query).all()
    return [_evaluation(row) for row in rows[:limit]], len(rows) > limit


def changed(connection: sa.Connection, owner: str, since: int, limit: int) -> list[Evaluation]:
    """The newest evaluations of a tenant that are not over, or ended at a time or later (microseconds, UTC)."""
    query = (
        sa.select(*_RECORD_COLUMNS)
        .where(
            evaluations.c.owner == owner,
            sa.or_(evaluations.c.status.not_in(_OVER), evaluations.c.finished_at >= since),
        )
        .order_by(evaluations.c.created_at.desc())
        .limit(limit)
    )
    return [_evaluation(row) for row in connection.execute(query)]


def rows_of(
    connection: sa.Connection,
    evaluation_id: str,
    *,
    outcome: Outcome | None = None,
    numbers: Collection[int] | None = None,
    after: int = -1,
    limit: int | None = None,
    is_pending: bool = False,
) -> dict[int, EvaluationRow]:
    """Rows of an evaluation by number from 0, in order.

    Args:
        connection: A connection.
        evaluation_id: The evaluation.
        outcome: Only rows with this outcome.
        numbers: Only these rows, at most a few hundred.
        after: Only rows with a higher number.
        limit: Maximum number.
        is_pending: Only rows without an outcome.
    """
    column = evaluation_rows.c
    query = sa.select(evaluation_rows).where(column.evaluation_id == evaluation_id, column.number > after)
    if outcome is not None:
        query = query.where(column.outcome == outcome.value)
    if numbers is not None:
        query = query.where(column.number.in_(numbers))
    if is_pending:
        query = query.where(column.outcome.is_(None))
    query = query.order_by(column.number)
    return {row.number: _row(row) for row in connection.execute(query.limit(limit))}


def outcomes_of(connection: sa.Connection, evaluation_id: str) -> list[EvaluationRow]:
    """All rows of an evaluation in order, without their texts."""
    column = evaluation_rows.c
    query = sa.select(column.line, column.outcome, column.expected, column.answer, column.error).where(
        column.evaluation_id == evaluation_id
    )
    return [
        EvaluationRow(
            line=row.line,
            outcome=None if row.outcome is None else Outcome(row.outcome),
            expected=row.expected,
            answer=row.answer,
            error=row.error,
        )
        for row in connection.execute(query.order_by(column.number))
    ]


# What the server that runs an evaluation calls


def claim(connection: sa.Connection, runner: str, at: int, until: int, busy: Collection[str]) -> Evaluation | None:
    """Take the oldest evaluation that no server runs.

    Args:
        connection: A transaction.
        runner: The server, by an id of its own.
        at: The time.
        until: When another server may take it, unless the lease is renewed.
        busy: Tenants whose evaluations this server runs already.
    """
    query = (
        sa.select(evaluations.c.id)
        .where(
            evaluations.c.status.not_in(_OVER),
            sa.or_(evaluations.c.leased_until.is_(None), evaluations.c.leased_until < at),
            evaluations.c.owner.not_in(busy),
        )
        .order_by(evaluations.c.created_at, evaluations.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    found = connection.execute(query).scalar_one_or_none()
    if found is None:
        return None
    values: dict[str, Any] = {"runner": runner, "leased_until": until}
    values["started_at"] = sa.func.coalesce(evaluations.c.started_at, at)
    values["status"] = sa.case(
        (evaluations.c.status == EvaluationStatus.QUEUED.value, EvaluationStatus.IN_PROGRESS.value),
        else_=evaluations.c.status,
    )
    connection.execute(evaluations.update().where(evaluations.c.id == found).values(values))
    return get(connection, found, None)


def record(
    connection: sa.Connection, evaluation_id: str, runner: str, until: int, answered: Mapping[int, EvaluationRow]
) -> EvaluationStatus | None:
    """Record outcomes, and renew the lease.

    Returns:
        The state of the evaluation; None if it was deleted, or another server runs it: nothing is recorded then.
    """
    if _locked(connection, evaluation_id, runner) is None:
        return None
    column = evaluation_rows.c
    if answered:
        update = (
            evaluation_rows.update()
            .where(column.evaluation_id == evaluation_id, column.number == sa.bindparam("at"))
            .values(outcome=sa.bindparam("is"), answer=sa.bindparam("given"), error=sa.bindparam("why"))
        )
        connection.execute(
            update,
            [
                {
                    "at": number,
                    "is": None if row.outcome is None else row.outcome.value,
                    "given": _storable(row.answer),
                    "why": _storable(row.error),
                }
                for number, row in sorted(answered.items())
            ],
        )
    found = [row.outcome for row in answered.values()]
    connection.execute(
        evaluations.update()
        .where(evaluations.c.id == evaluation_id)
        .values(
            num_right=evaluations.c.num_right + found.count(Outcome.RIGHT),
            num_errors=evaluations.c.num_errors + found.count(Outcome.ERROR),
            num_answered=evaluations.c.num_answered + len(found),
            num_bytes=evaluations.c.num_bytes + sum(_size(row) for row in answered.values()),
            leased_until=until,
        )
    )
    return _locked(connection, evaluation_id, runner)


def finish(
    connection: sa.Connection,
    evaluation_id: str,
    runner: str,
    status: EvaluationStatus,
    *,
    at: int,
    scores: Mapping[str, object] | None,
    failure: str | None,
    keeps_texts: bool,
) -> None:
    """End an evaluation that this server runs; no effect if it does not any more.

    Args:
        connection: A transaction.
        evaluation_id: The evaluation.
        runner: The server.
        status: Its last state.
        at: The time.
        scores: What was computed from the outcomes.
        failure: Why it failed.
        keeps_texts: Whether to keep the texts of the rows.
    """
    if _locked(connection, evaluation_id, runner) is None:
        return
    values: dict[str, Any] = {
        "status": status.value,
        "finished_at": at,
        "scores": None if scores is None else json.dumps(scores),
        "failure": _storable(failure),
        "runner": None,
        "leased_until": None,
    }
    if not keeps_texts:
        of_it = evaluation_rows.c.evaluation_id == evaluation_id
        connection.execute(evaluation_rows.update().where(of_it).values(text=None))
        values["num_bytes"] = 0
    connection.execute(evaluations.update().where(evaluations.c.id == evaluation_id).values(values))


def release(connection: sa.Connection, runner: str | None) -> None:
    """Let other servers take what a server runs, or what any server runs: it stops, or has stopped."""
    is_run = evaluations.c.runner.is_not(None) if runner is None else evaluations.c.runner == runner
    connection.execute(evaluations.update().where(is_run).values(runner=None, leased_until=None))


# What clients call


def cancel(connection: sa.Connection, evaluation_id: str, owner: str, at: int) -> Evaluation:
    """End an evaluation early; no effect if it is over. Raises JobNotFoundError as ``get`` does."""
    found = get(connection, evaluation_id, owner)
    column = evaluations.c
    waiting = sa.and_(column.status == EvaluationStatus.QUEUED.value, column.runner.is_(None))
    connection.execute(
        evaluations.update()
        .where(column.id == found.id, column.status.not_in(_OVER))
        .values(
            status=sa.case((waiting, EvaluationStatus.CANCELLED.value), else_=EvaluationStatus.CANCELLING.value),
            finished_at=sa.case((waiting, at), else_=None),
            num_bytes=sa.case((waiting, 0), else_=column.num_bytes),
        )
    )
    found = get(connection, evaluation_id, owner)
    if found.status is EvaluationStatus.CANCELLED and not found.settings.get("keep_texts"):
        of_it = evaluation_rows.c.evaluation_id == evaluation_id
        connection.execute(evaluation_rows.update().where(of_it).values(text=None))
    return found


def delete(connection: sa.Connection, evaluation_id: str, owner: str) -> None:
    """Delete an evaluation.

    Raises:
        JobNotFoundError: As ``get``.
        PromptConflictError: If it is not over.
    """
    if not get(connection, evaluation_id, owner).status.is_over:
        raise PromptConflictError(f"the evaluation {evaluation_id} is not over; cancel it first")
    _delete(connection, evaluation_id)


def _delete(connection: sa.Connection, evaluation_id: str) -> None:
    connection.execute(evaluation_rows.delete().where(evaluation_rows.c.evaluation_id == evaluation_id))
    connection.execute(evaluations.delete().where(evaluations.c.id == evaluation_id))


def _make_room(connection: sa.Connection, evaluation: Evaluation, num_bytes: int) -> None:
    column = evaluations.c
    of_owner = column.owner == evaluation.owner
    waiting = connection.execute(sa.select(sa.func.count()).where(of_owner, column.status.not_in(_OVER))).scalar_one()
    if waiting >= MAX_WAITING and not evaluation.status.is_over:
        raise JobsFullError(f"{waiting} evaluations are waiting or running already; try again later, or cancel some")
    query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(column.num_bytes), 0)).where(of_owner)
    count, used = connection.execute(query).one()
    oldest = sa.select(column.id, column.num_bytes).where(of_owner, column.status.in_(_OVER))
    for row in connection.execute(oldest.order_by(column.created_at, column.id)).all():
        if count < MAX_EVALUATIONS and used + num_bytes <= MAX_TENANT_BYTES:
            return
        _delete(connection, row.id)
        count, used = count - 1, used - row.num_bytes
    if count >= MAX_EVALUATIONS or used + num_bytes > MAX_TENANT_BYTES:
        raise JobsFullError("the evaluations that are not over hold too much; try again later, or cancel some")


def _locked(connection: sa.Connection, evaluation_id: str, runner: str) -> EvaluationStatus | None:
    """The state of an evaluation that a server runs, whose row is locked until the transaction ends."""
    query = sa.select(evaluations.c.status).where(evaluations.c.id == evaluation_id, evaluations.c.runner == runner)
    found = connection.execute(query.with_for_update()).scalar_one_or_none()
    return None if found is None else EvaluationStatus(found)


def _size(row: EvaluationRow) -> int:
    return sum(len(text.encode()) for text in (row.text, row.expected, row.answer, row.error) if text is not None)


def _storable(text: str | None) -> str | None:
    """A text that PostgreSQL can store: a model may generate NUL."""
    return None if text is None else text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _row_values(evaluation_id: str, number: int, row: EvaluationRow) -> dict[str, Any]:
    return {
        "evaluation_id": evaluation_id,
        "number": number,
        "line": row.line,
        "outcome": None if row.outcome is None else row.outcome.value,
        "expected": _storable(row.expected),
        "answer": _storable(row.answer),
        "text": _storable(row.text),
        "error": _storable(row.error),
    }


def _row(row: Any) -> EvaluationRow:
    return EvaluationRow(
        line=row.line,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        expected=row.expected,
        answer=row.answer,
        text=row.text,
        error=row.error,
    )


def _evaluation(row: Any) -> Evaluation:
    return Evaluation(
        id=row.id,
        owner=row.owner,
        key=row.key,
        name=row.name,
        model=row.model,
        prompt=row.prompt,
        version=row.version,
        is_recorded=row.is_recorded,
        status=EvaluationStatus(row.status),
        dataset=row.dataset,
        dataset_digest=row.dataset_digest,
        metric=row.metric,
        settings=json.loads(row.settings),
        total=row.total,
        right=row.num_right,
        errors=row.num_errors,
        answered=row.num_answered,
        scores=None if row.scores is None else json.loads(row.scores),
        failure=row.failure,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
