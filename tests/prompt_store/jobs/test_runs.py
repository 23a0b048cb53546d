"""Training runs in the catalog, on either database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prompt_store.errors import JobNotFoundError, JobsFullError
from prompt_store.jobs import runs as module
from prompt_store.jobs.jobs import Jobs, TrainingRuns
from prompt_store.jobs.types import RunPoint, RunStatus, TrainingRun
from tests.prompt_store.jobs.test_evaluations import catalog, jobs, url

__all__ = ["catalog", "jobs", "url"]


@pytest.fixture
def kept(jobs: Jobs) -> TrainingRuns:
    return jobs.runs


def run(number: int, owner: str = "a", **fields: object) -> TrainingRun:
    found = TrainingRun(
        id=f"run-{number:032x}",
        owner=owner,
        key="key-1",
        name="tone",
        method="prompt_tuning",
        base="tiny",
        status=RunStatus.RUNNING,
        num_steps=10,
        settings={"seed": 0},
        started_at=number,
        updated_at=number,
    )
    return replace(found, **fields)  # type: ignore[arg-type]


def test_a_run_is_reported_until_it_is_over(kept: TrainingRuns) -> None:
    assert kept.put(run(1))
    end = run(
        1,
        status=RunStatus.COMPLETED,
        step=10,
        scores={"trained": {"accuracy": 0.9}},
        golden_check={"is_passed": True},
        version=3,
        alias="candidate",
        warnings=("a warning",),
        best_step=8,
        finished_at=5,
    )
    assert not kept.put(end)
    assert kept.get(end.id, "a") == end


def test_metrics_are_merged_by_step_and_dropped_after_a_resumption(kept: TrainingRuns) -> None:
    kept.put(run(1))
    kept.add_points(run(1).id, "a", [RunPoint(2, {"loss": 2.0}), RunPoint(1, {"loss": 3.0})])
    kept.add_points(run(1).id, "a", [RunPoint(2, {"eval_loss": 1.5}), RunPoint(3, {"loss": 1.0})])
    kept.add_points(run(1).id, "a", [RunPoint(2, {"loss": 2.0})])
    assert kept.points(run(1).id, "a") == [
        RunPoint(1, {"loss": 3.0}),
        RunPoint(2, {"loss": 2.0, "eval_loss": 1.5}),
        RunPoint(3, {"loss": 1.0}),
    ]
    assert kept.points(run(1).id, "a", after=1, limit=1) == [RunPoint(2, {"loss": 2.0, "eval_loss": 1.5})]
    assert kept.get(run(1).id, "a").step == 3
    kept.truncate(run(1).id, "a", 1)
    assert [point.step for point in kept.points(run(1).id, "a")] == [1]


def test_tenants_see_their_own_and_cannot_take_an_id(kept: TrainingRuns) -> None:
    kept.put(run(1))
    for use in (
        lambda: kept.get(run(1).id, "b"),
        lambda: kept.put(run(1, owner="b")),
        lambda: kept.points(run(1).id, "b"),
        lambda: kept.add_points(run(1).id, "b", [RunPoint(1, {"loss": 1.0})]),
        lambda: kept.truncate(run(1).id, "b", 0),
        lambda: kept.delete(run(1).id, "b"),
    ):
        with pytest.raises(JobNotFoundError):
            use()
    assert kept.list_all("b") == ([], False)
    assert (len(kept.changed("a", 0)), kept.changed("b", 0)) == (1, [])


def test_runs_are_listed_deleted_and_bounded(kept: TrainingRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        kept.put(run(number, name="tone" if number else "other"))
    page, has_more = kept.list_all("a", limit=2)
    assert ([one.started_at for one in page], has_more) == ([2, 1], True)
    assert [one.started_at for one in kept.list_all("a", after=page[-1].id)[0]] == [0]
    assert [one.started_at for one in kept.list_all("a", "other")[0]] == [0]
    kept.add_points(run(2).id, "a", [RunPoint(1, {"loss": 1.0})])
    kept.delete(run(2).id, "a")
    monkeypatch.setattr(module, "MAX_RUNS", 2)
    kept.put(run(3))
    assert [one.started_at for one in kept.list_all("a")[0]] == [3, 1]
    monkeypatch.setattr(module, "MAX_POINTS", 2)
    with pytest.raises(JobsFullError, match="0 steps already"):
        kept.add_points(run(3).id, "a", [RunPoint(step, {"loss": 1.0}) for step in range(3)])
