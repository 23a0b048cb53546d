"""Programs that the tests need and pip does not bring."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

_HOW_TO_INSTALL = {
    "promtool": "apt-get install prometheus",
    "prometheus": "apt-get install prometheus",
    "docker-compose": "apt-get install docker-compose",
    "kubectl": "version 1.27 or later, from kubernetes.io/docs/tasks/tools",
}


def tool(name: str) -> str:
    """The path of a program; skips the test, saying how to install it, where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {_HOW_TO_INSTALL[name]}")
    return found


def run(name: str, *arguments: str | Path, text: str = "", environment: dict[str, str] | None = None) -> str:
    """What a program writes; the test fails with that where it does not end with status 0."""
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(
        command, input=text, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
