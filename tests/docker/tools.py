"""Programs that the tests need and pip does not install."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

_HOW_TO_INSTALL = {
    "promtool": "apt-get install prometheus",
    "prometheus": "apt-get install prometheus",
    "docker-compose": "apt-get install docker-compose",
    "helm": "make chart-tools",
    "kubectl": "version 1.27 or later, from kubernetes.io/docs/tasks/tools",
}


def tool(name: str) -> str:
    """The path of a program; skips the test with installation advice if it is missing."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed: {_HOW_TO_INSTALL[name]}")
    return found


def run(name: str, *arguments: str | Path, text: str = "", environment: dict[str, str] | None = None) -> str:
    """The output of a program; the test fails with it if the exit status is not 0."""
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(
        command, input=text, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
