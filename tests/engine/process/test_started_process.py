"""An engine's process, played by a small program: how it starts, and that none is left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from server.config import EngineSettings
from server.engine.messages import Stage
from server.engine.process import started_process
from server.engine.process.connection import launch
from server.engine.process.started_process import StartedProcess
from server.errors import EngineStartError
from tests.startup.test_display import MODEL

SETTINGS = EngineSettings(model="m")

PROGRAM = """
import socket, sys
from server.engine.frames import receive
from server.engine.messages import *
from tests.startup.test_display import MODEL
connection = socket.socket(fileno=int(sys.argv[1]))
start = to_engine_decoder.decode(receive(connection))
assert start.settings.model == "m"
for stage in (Stage.LOADING, Stage.CHECKING):
    connection.sendall(encode_frame(Progress(stage)))
"""
SERVES = "connection.sendall(encode_frame(Ready(MODEL))); receive(connection)"
FAILS = 'connection.sendall(encode_frame(StartFailed("no such model")))'
ENDS = "sys.exit(7)"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM + request.param)
    monkeypatch.setattr(started_process, "command", lambda _: [sys.executable, str(path)])
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))


@contextmanager
def leaves_none_behind() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.anyio
@pytest.mark.parametrize("program", [SERVES], indirect=True)
@pytest.mark.parametrize("is_early", [False, True])
async def test_the_stages_of_a_start_are_reported(program: None, is_early: bool) -> None:
    stages: list[Stage] = []
    with leaves_none_behind():
        early = StartedProcess(SETTINGS) if is_early else None
        connection = await launch(SETTINGS, early, on_stage=stages.append)
        assert stages == [Stage.LOADING, Stage.CHECKING]
        assert connection.model == MODEL
        assert early is None or connection.pid == early.pid
        assert await connection.close() == "ended with status 0"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("program", "reason"),
    [(FAILS, "no such model"), (ENDS, "the engine process ended with status 7 while it started")],
    indirect=["program"],
)
async def test_a_failed_start_leaves_no_process(program: None, reason: str) -> None:
    with leaves_none_behind(), pytest.raises(EngineStartError, match=reason):
        await launch(SETTINGS)


@pytest.mark.parametrize("program", [SERVES], indirect=True)
def test_a_process_that_is_not_used_is_killed(program: None) -> None:
    with leaves_none_behind(), StartedProcess(SETTINGS) as process:
        assert psutil.pid_exists(process.pid)


@pytest.mark.parametrize("program", [SERVES], indirect=True)
def test_a_process_has_one_user(program: None) -> None:
    with StartedProcess(SETTINGS) as process, process.take_socket(), pytest.raises(RuntimeError, match="in use"):
        process.take_socket()


def test_a_program_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(started_process, "command", lambda _: ["/no/such/program"])
    with leaves_none_behind(), pytest.raises(EngineStartError, match="cannot be started: .*No such file"):
        StartedProcess(SETTINGS)
