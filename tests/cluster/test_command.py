"""``prelude cluster`` without Ray, and what it remembers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.cluster.local_ray import State, StateFile, is_running
from server.cluster.replica.process import Place
from server.errors import ConfigurationError


def test_a_mistake_in_the_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("bases: [{name: demo, model: m, store: s, catalog: 'sqlite:///c'}]")
    for command in ("up", "status", "down"):
        result = CliRunner().invoke(app, ["cluster", command, "--config", str(path)])
        assert result.exit_code == 1
        assert "SQLite belongs to one process" in result.output
        assert len(result.output.splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["cluster", "up", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert "none.yaml cannot be read" in result.output


def test_the_state_is_kept_until_it_is_removed(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "cluster")
    assert file.read() is None
    state = State(address="127.0.0.1:1", pid=7, port=8000, applications={"a": "b"})
    file.write(state)
    assert file.read() == state
    file.path.write_text("[")
    with pytest.raises(ConfigurationError, match="damaged"):
        file.read()
    file.remove()
    assert file.read() is None


def test_processes_are_found_by_their_id() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert is_running(os.getpid())
    assert not is_running(process.pid)


def test_two_replicas_never_share_a_directory_and_numbers_are_used_again(tmp_path: Path) -> None:
    first, second = Place(tmp_path, "demo"), Place(tmp_path, "demo")
    assert (first.name, second.name) == ("demo-0", "demo-1")
    first.release()
    again, named = Place(tmp_path, "demo"), Place(tmp_path, "demo", "host")
    assert again.folder == first.folder
    assert named.name == "demo-host-2"
    for place in (second, again, named):
        place.release()
