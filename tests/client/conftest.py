"""The command line against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from server.cli import app as cli
from tests.support.api_fixtures import PeftDirectory
from tests.support.live_server import LiveServer

Get = Callable[[str], Any]
Ok = Callable[..., str]
Prelude = Callable[..., Result]
Data = Callable[..., Any]


@pytest.fixture
def prelude(live: LiveServer) -> Prelude:
    def invoke(*arguments: str, **options: Any) -> Any:
        return CliRunner().invoke(cli, list(arguments), env={"PRELUDE_URL": live.url}, **options)

    return invoke


@pytest.fixture
def ok(prelude: Prelude) -> Ok:
    """Run a command that must succeed; returns its standard output."""

    def invoke(*arguments: str) -> str:
        result = prelude(*arguments)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return result.stdout

    return invoke


@pytest.fixture
def data(ok: Ok) -> Data:
    """Run a command with --json; returns the parsed output."""

    def invoke(*arguments: str) -> Any:
        return json.loads(ok(*arguments, "--json"))

    return invoke


@pytest.fixture
def get(live: LiveServer) -> Get:
    return lambda path: httpx.get(f"{live.url}/v1/prompts{path}").json()


@pytest.fixture
def two(ok: Ok, peft_directory: PeftDirectory) -> None:
    """Two versions of sentiment; the second is latest."""
    for seed in (0, 1):
        ok("push", str(peft_directory("sentiment", seed=seed)), "--id", "sentiment")
