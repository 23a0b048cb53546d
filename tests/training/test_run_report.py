"""The report of a training: what is sent, what waits while the server is away; no training fails for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.client.http import ClientError
from server.training.errors import GoldenCheckError, TrainingError
from server.training.reporting import run_report
from server.training.reporting.run_report import RunReport, reporting
from server.training.run_directory import RunDirectory
from server.training.settings import TrainSettings
from tests.support.waiting import wait_until

AWAY = ClientError("cannot be reached", code="unreachable")


class FakeServer:
    """Stands in for a client; keeps the run and its points as a server would."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.runs: dict[str, dict[str, Any]] = {}
        self.points: dict[int, dict[str, float]] = {}
        self.num_calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, path: str, *, json: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        assert method == "PUT"
        self.runs[path.removeprefix("/v1/runs/")] = json
        return json

    def send(self, method: str, path: str, *, json: dict[str, Any]) -> None:
        self._answer()
        assert path.removeprefix("/v1/runs/").removesuffix("/metrics") in self.runs
        if "after_step" in json:
            self.points = {step: values for step, values in self.points.items() if step <= json["after_step"]}
        for point in json["data"]:
            self.points.setdefault(point["step"], {}).update(point["values"])

    def _answer(self) -> None:
        self.num_calls += 1
        self.gate.wait()
        if self.failure is not None:
            raise self.failure

    @property
    def run(self) -> dict[str, Any]:
        ((_, found),) = self.runs.items()
        return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    found = FakeServer()
    monkeypatch.setattr(run_report, "PreludeClient", lambda url, api_key: found)
    monkeypatch.setattr(run_report, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(run_report, "_MAX_PAUSE_SECONDS", 0.02)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def begin(tmp_path: Path, said: list[str]) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        run_dir = tmp_path / "run"
        settings = TrainSettings(model="tiny", data=tmp_path / "d", name="words", run_dir=run_dir, **changes)
        return reporting("http://h", None, settings, said.append)

    return make


RESULT = {
    "base_model": "org/tiny",
    "steps": 2,
    "best_step": 1,
    "scores": {"trained": {"loss": 0.5, "accuracy": 0.9}},
    "published": {"version": 3, "alias": "candidate", "golden_check": {"is_passed": True}},
}


def test_the_run_its_metrics_and_its_end_are_sent(
    server: FakeServer, directory: RunDirectory, begin: Callable[..., Any], said: list[str]
) -> None:
    with begin(description="secret", init_text="secret") as report:
        report.warn("diverges")
        assert server.num_calls == 0, "nothing is sent before the first step"
        directory.record({"step": 1, "epoch": 0.5, "loss": 2.0, "note": "text"})
        report.progress(1, 2)
        wait_until(lambda: server.points == {1: {"epoch": 0.5, "loss": 2.0}})
        assert (server.run["status"], server.run["num_steps"], server.run["warnings"]) == ("running", 2, ["diverges"])
        directory.record({"step": 2, "loss": float("nan")})
        directory.record({"step": 2, "eval_loss": 1.0, "eval_accuracy": 0.5})
        report.progress(2, 2)
        report.complete(RESULT)
    assert server.points[2] == {"eval_loss": 1.0, "eval_accuracy": 0.5}
    run = server.run
    assert (run["status"], run["version"], run["alias"], run["step"]) == ("completed", 3, "candidate", 2)
    assert (run["golden_check"], run["base_model"]) == ({"is_passed": True}, "org/tiny")
    assert "secret" not in json.dumps(run)
    assert str(directory.path) not in json.dumps(run)
    assert said == []


def test_what_is_new_waits_while_the_server_is_away(
    server: FakeServer, directory: RunDirectory, begin: Callable[..., Any], said: list[str]
) -> None:
    server.failure = AWAY
    with begin() as report:
        directory.record({"step": 1, "loss": 2.0})
        report.progress(1, 3)
        wait_until(lambda: server.num_calls > 3)
        directory.record({"step": 2, "loss": 1.0})
        report.progress(2, 3)
        server.failure = None
        wait_until(lambda: len(server.points) == 2)
        server.failure = ClientError("full", status=429, code="overloaded")
        directory.record({"step": 3, "loss": 0.5})
        report.progress(3, 3)
        wait_until(lambda: len(said) == 2)
        server.failure = None
        report.complete(RESULT)
    assert (sorted(server.points), server.run["status"]) == ([1, 2, 3], "completed")
    assert ["waits" in line for line in said] == [True, True]


def test_a_resumed_training_goes_on_with_the_same_run(
    server: FakeServer, directory: RunDirectory, begin: Callable[..., Any], said: list[str]
) -> None:
    server.failure = AWAY
    with begin() as report:
        for step in (1, 2, 3):
            directory.record({"step": step, "loss": 1.0})
        report.progress(3, 4)
        report.complete(RESULT)
    assert "--resume sends the rest" in said[-1]
    (first,) = [directory.read("report.json")]
    server.failure = None
    with begin(resume=True) as report:
        directory.truncate_records(2)
        report.complete(RESULT)
    assert list(server.runs) == [first["id"]]
    assert server.run["started_at"] == first["started_at"]
    assert sorted(server.points) == [1, 2]
    with begin() as report:
        report.progress(1, 4)
    assert len(server.runs) == 2, "a new training is a new run"


def test_metrics_of_steps_that_are_trained_again_are_replaced(
    server: FakeServer, directory: RunDirectory, begin: Callable[..., Any]
) -> None:
    with begin() as report:
        for step in (1, 2, 3):
            directory.record({"step": step, "loss": 1.0})
        report.progress(3, 4)
        wait_until(lambda: sorted(server.points) == [1, 2, 3])
        directory.truncate_records(1)
        directory.record({"step": 2, "loss": 7.0})
        wait_until(lambda: server.points == {1: {"loss": 1.0}, 2: {"loss": 7.0}})


@pytest.mark.parametrize(
    "failure",
    [
        ClientError("requires the scope prompts:write", status=403, code="insufficient_scope"),
        RuntimeError("bug"),
    ],
)
def test_a_refused_report_is_said_once_and_no_error(
    server: FakeServer, directory: RunDirectory, begin: Callable[..., Any], said: list[str], failure: Exception
) -> None:
    server.failure = failure
    with begin() as report:
        report.progress(1, 2)
        wait_until(lambda: bool(said))
        report.progress(2, 2)
        report.complete(RESULT)
    assert len(said) == 1
    assert str(failure) in said[0]
    assert server.num_calls == 1


def test_the_end_waits_for_a_limited_time(
    server: FakeServer,
    directory: RunDirectory,
    begin: Callable[..., Any],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_report, "CLOSE_SECONDS", 0.05)
    server.gate.clear()
    with begin() as report:
        report.progress(1, 2)
    server.gate.set()
    assert "--resume sends the rest" in said[0]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (TrainingError("the loss is not finite"), "failed", "the loss is not finite"),
        (GoldenCheckError("differs", difference=1.0, tolerance=0.1), "failed", "differs"),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_how_a_training_ends_is_reported(
    server: FakeServer,
    directory: RunDirectory,
    begin: Callable[..., Any],
    error: BaseException,
    status: str,
    text: str | None,
) -> None:
    directory.write("golden_check.json", {"is_passed": False})
    with pytest.raises(type(error)), begin() as report:
        report.progress(1, 2)
        raise error
    assert (server.run["status"], server.run.get("error")) == (status, text)
    assert ("golden_check" in server.run) == isinstance(error, GoldenCheckError)


def test_a_training_that_never_began_is_not_reported(
    server: FakeServer, directory: RunDirectory, begin: Callable[..., Any]
) -> None:
    with pytest.raises(TrainingError), begin():
        raise TrainingError("bad settings")
    assert server.num_calls == 0
    assert not (directory.path / "report.json").exists()


def test_without_a_url_there_is_no_report_and_a_bad_one_is_an_error(tmp_path: Path) -> None:
    settings = TrainSettings(model="tiny", data=tmp_path / "d", name="words")

    def opened(url: str | None) -> Iterator[RunReport | None]:
        with reporting(url, None, settings, print) as report:
            yield report

    assert list(opened(None)) == [None]
    with pytest.raises(ClientError, match="not an http or https URL"):
        list(opened("ftp://h"))
