"""Evaluations in the catalog, on either database: leases, outcomes, room, tenants, migration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from prompt_store.cached_catalog import CachedCatalog
from prompt_store.catalog import database as database_module
from prompt_store.catalog.catalog import Catalog
from prompt_store.catalog.database import Database
from prompt_store.errors import JobNotFoundError, JobsFullError, PromptConflictError
from prompt_store.jobs import evaluations as module
from prompt_store.jobs.jobs import Evaluations, Jobs, TrainingRuns
from prompt_store.jobs.types import (
    Evaluation,
    EvaluationFilter,
    EvaluationRow,
    EvaluationStatus,
    Outcome,
    RunPoint,
    RunStatus,
    TrainingRun,
)
from tests.prompt_store.databases import postgres_url, sqlite_url

LONG = 1000.0


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path)
        return
    with postgres_url() as found:
        yield found


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(Database(url))
    yield opened
    opened.close()


@pytest.fixture
def jobs(catalog: Catalog) -> Jobs:
    return Jobs(catalog, CachedCatalog(catalog))


@pytest.fixture
def kept(jobs: Jobs) -> Evaluations:
    return jobs.evaluations


def evaluation(number: int, owner: str = "a", **fields: object) -> Evaluation:
    found = Evaluation(
        id=f"eval-{number:032x}",
        owner=owner,
        key="key-1",
        name="nightly",
        model="tone@2",
        prompt="tone",
        version=2,
        is_recorded=False,
        status=EvaluationStatus.QUEUED,
        dataset="test.jsonl",
        dataset_digest="0" * 64,
        metric="accuracy",
        settings={"keep_texts": False},
        total=2,
        created_at=number,
    )
    return replace(found, **fields)  # type: ignore[arg-type]


def rows(*labels: str) -> list[EvaluationRow]:
    return [
        EvaluationRow(line=line, expected=label, text=f'{{"text": "t{line}"}}')
        for line, label in enumerate(labels, 1)
    ]


def answer(row: EvaluationRow, text: str) -> EvaluationRow:
    return replace(row, answer=text, outcome=Outcome.RIGHT if text == row.expected else Outcome.WRONG)


def test_an_evaluation_is_answered_under_a_lease(kept: Evaluations) -> None:
    kept.add(evaluation(1), rows("x", "y"))
    found = kept.claim("one", LONG, [])
    assert found is not None
    assert (found.status, found.started_at is None) == (EvaluationStatus.IN_PROGRESS, False)
    assert kept.claim("other", LONG, []) is None
    pending = kept.pending(found.id)
    assert [row.text for row in pending.values()] == ['{"text": "t1"}', '{"text": "t2"}']
    assert kept.record(found.id, "other", LONG, {0: answer(pending[0], "x")}) is None
    status = kept.record(found.id, "one", LONG, {0: answer(pending[0], "x\0")})
    assert status is EvaluationStatus.IN_PROGRESS
    assert list(kept.pending(found.id)) == [1]
    failed = replace(pending[1], outcome=Outcome.ERROR, error="too long")
    kept.record(found.id, "one", LONG, {1: failed})
    kept.finish(found.id, "one", EvaluationStatus.COMPLETED, scores={"accuracy": 0.0})
    found = kept.get(found.id, "a")
    assert (found.answered, found.right, found.errors, found.scores) == (2, 0, 1, {"accuracy": 0.0})
    assert found.finished_at is not None
    listed = kept.rows(found.id, "a", outcome=None, after=-1, limit=10)
    assert [(row.answer, row.text, row.error) for row in listed.values()] == [
        ("x\N{REPLACEMENT CHARACTER}", None, None),
        (None, None, "too long"),
    ]
    assert list(kept.rows(found.id, "a", outcome=Outcome.ERROR, after=-1, limit=10)) == [1]
    assert list(kept.rows_by_number(found.id, "a", [1])) == [1]


def test_what_a_server_leaves_is_taken_by_another(kept: Evaluations) -> None:
    kept.add(evaluation(1), rows("x"))
    assert kept.claim("gone", -1, []) is not None
    found = kept.claim("one", LONG, [])
    assert found is not None
    kept.finish(found.id, "gone", EvaluationStatus.FAILED, failure="late")
    assert kept.get(found.id, "a").status is EvaluationStatus.IN_PROGRESS
    kept.release("one")
    assert kept.claim("two", LONG, ["a"]) is None, "the tenant is busy"
    assert kept.claim("two", LONG, []) is not None


def test_a_waiting_one_is_cancelled_at_once_and_a_running_one_by_its_server(kept: Evaluations) -> None:
    kept.add(evaluation(1), rows("x"))
    kept.add(evaluation(2), rows("x"))
    running = kept.claim("one", LONG, [])
    assert running is not None
    assert kept.cancel(running.id, "a").status is EvaluationStatus.CANCELLING
    assert kept.record(running.id, "one", LONG, {}) is EvaluationStatus.CANCELLING
    with pytest.raises(PromptConflictError, match="cancel it first"):
        kept.delete(running.id, "a")
    kept.finish(running.id, "one", EvaluationStatus.CANCELLED)
    cancelled = kept.cancel(evaluation(2).id, "a")
    assert (cancelled.status, cancelled.finished_at is None) == (EvaluationStatus.CANCELLED, False)
    (row,) = kept.rows(cancelled.id, "a", outcome=None, after=-1, limit=1).values()
    assert row.text is None
    assert kept.cancel(cancelled.id, "a") == cancelled
    kept.delete(cancelled.id, "a")
    assert [one.id for one in kept.list_all("a", EvaluationFilter())[0]] == [running.id]


def test_tenants_see_their_own(kept: Evaluations) -> None:
    kept.add(evaluation(1), rows("x"))
    for use in (
        lambda: kept.get(evaluation(1).id, "b"),
        lambda: kept.outcomes(evaluation(1).id, "b"),
        lambda: kept.rows(evaluation(1).id, "b", outcome=None, after=-1, limit=1),
        lambda: kept.cancel(evaluation(1).id, "b"),
        lambda: kept.delete(evaluation(1).id, "b"),
    ):
        with pytest.raises(JobNotFoundError):
            use()
    assert kept.list_all("b", EvaluationFilter()) == ([], False)
    assert kept.changed("b", 0) == []
    assert len(kept.changed("a", 0)) == 1


def test_lists_are_filtered_and_paged(kept: Evaluations) -> None:
    done: dict[str, Any] = {"status": EvaluationStatus.COMPLETED, "is_recorded": True, "finished_at": 1}
    for number in range(5):
        kept.add(evaluation(number, version=number % 2 + 1, model=f"tone@{number % 2 + 1}", **done), rows("x"))
    page, has_more = kept.list_all("a", EvaluationFilter(prompt="tone"), limit=2)
    assert ([one.created_at for one in page], has_more) == ([4, 3], True)
    page, has_more = kept.list_all("a", EvaluationFilter(), limit=3, after=page[-1].id)
    assert ([one.created_at for one in page], has_more) == ([2, 1, 0], False)
    for only, count in (
        (EvaluationFilter(version=1), 3),
        (EvaluationFilter(model="tone@2"), 2),
        (EvaluationFilter(status=EvaluationStatus.QUEUED), 0),
        (EvaluationFilter(dataset_digest="0" * 64, status=EvaluationStatus.COMPLETED), 5),
    ):
        assert len(kept.list_all("a", only)[0]) == count
    with pytest.raises(JobNotFoundError):
        kept.list_all("a", EvaluationFilter(), after="eval-9")


def test_the_oldest_make_room(kept: Evaluations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EVALUATIONS", 2)
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    done: dict[str, Any] = {"status": EvaluationStatus.COMPLETED, "finished_at": 1}
    for number in range(3):
        kept.add(evaluation(number, **done), rows("x"))
    assert [one.created_at for one in kept.list_all("a", EvaluationFilter())[0]] == [2, 1]
    for number in (3, 4):
        kept.add(evaluation(number), rows("x"))
    with pytest.raises(JobsFullError, match="2 evaluations are waiting"):
        kept.add(evaluation(5), rows("x"))
    with pytest.raises(JobsFullError, match="hold too much"):
        kept.add(evaluation(5, **done), rows("x"))
    kept.add(evaluation(6, owner="b"), rows("x"))
    monkeypatch.setattr(module, "MAX_TENANT_BYTES", 30)
    kept.cancel(evaluation(3).id, "a")
    kept.cancel(evaluation(4).id, "a")
    with pytest.raises(JobsFullError, match="hold too much"):
        kept.add(evaluation(7, **done), rows("x" * 31))


def test_the_schema_is_migrated_up_and_down_with_data(url: str, catalog: Catalog, jobs: Jobs) -> None:
    jobs.evaluations.add(evaluation(1), rows("x", "y"))
    run = TrainingRun(
        id="run-1",
        owner="a",
        key=None,
        name="tone",
        method="lora",
        base="tiny",
        status=RunStatus.RUNNING,
        started_at=1,
        updated_at=1,
    )
    jobs.runs.put(run)
    jobs.runs.add_points("run-1", "a", [RunPoint(1, {"loss": 1.0})])
    catalog.close()
    database = Database(url)
    with database.writing() as connection:
        config = database_module._alembic()
        config.attributes["connection"] = connection
        command.downgrade(config, "0008")
        assert not {"evaluations", "training_runs"} & set(sa.inspect(connection).get_table_names())
        command.upgrade(config, "head")
    database.close()
    again = Catalog(Database(url))
    kept, runs = Evaluations(again, CachedCatalog(again)), TrainingRuns(again, CachedCatalog(again))
    assert kept.list_all("a", EvaluationFilter()) == ([], False)
    kept.add(evaluation(1), rows("x", "y"))
    assert runs.put(run)
    again.close()
