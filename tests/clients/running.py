"""Clients in separate environments, which ``make test-clients`` installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.demo.tour import HELDOUT_DIRECTORY

FOLDER = Path(__file__).parent
TASKS = ("sentiment", "intent", "extract", "dates")

DIRECTORY_VARIABLE = "PRELUDE_TEST_CLIENTS"
"""Names the virtual environment of the Python clients; without it, tests that need it are skipped."""

_PROGRAM_SECONDS = 240.0

# No client may use the network: the tokenizer is in a directory, and the tests create the data.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGCHAIN_TRACING_V2": "false",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class ClientEnvironment:
    """An interpreter whose packages are the clients.

    Attributes:
        interpreter: Runs a program from its standard input.
        folder: Working directory, from which node looks for packages.
    """

    interpreter: list[str]
    folder: Path
    variables: Mapping[str, str] = field(default_factory=lambda: {**os.environ, **_OFFLINE})

    def command(self, name: str) -> str:
        """A command that a package installed next to the interpreter."""
        return str(Path(self.interpreter[0]).parent / name)

    def run(self, program: str, *arguments: str) -> str:
        """Run the text of a program; returns what it printed."""
        return self.call([*self.interpreter, *arguments], program)

    def json(self, name: str, *arguments: object) -> dict[str, Any]:
        """Run ``programs/NAME``, which prints one JSON object; arguments that are not strings are passed as JSON."""
        texts = [argument if isinstance(argument, str) else json.dumps(argument) for argument in arguments]
        printed: dict[str, Any] = json.loads(self.run((FOLDER / "programs" / name).read_text(), *texts))
        return printed

    def call(self, command: list[str], program: str = "", *, seconds: float = _PROGRAM_SECONDS) -> str:
        """Run a command that must succeed; returns its standard output."""
        result = subprocess.run(
            command,
            input=program,
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
        return result.stdout


def python_environment() -> ClientEnvironment:
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        pytest.skip(f"needs a separate environment: make test-clients creates it, {DIRECTORY_VARIABLE} names it")
    return ClientEnvironment([str(Path(directory).absolute() / "bin" / "python"), "-"], FOLDER.parents[1])


def node_environment() -> ClientEnvironment:
    if DIRECTORY_VARIABLE not in os.environ:
        pytest.skip("needs npm packages: make test-clients installs them")
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, which is not installed")
    return ClientEnvironment([node, "--input-type=module", "-"], FOLDER / "node")


def heldout(task: str) -> list[dict[str, str]]:
    """Pairs of ``input`` and ``output`` that a soft prompt was not trained on."""
    return [json.loads(line) for line in (HELDOUT_DIRECTORY / f"{task}.jsonl").read_text().splitlines()]
