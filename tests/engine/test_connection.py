"""The engine process's surroundings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine.model import environment as variables
from server.engine.process import connection

CHOSEN = {
    "GOMP_SPINCOUNT": variables.SPIN_COUNT,
    variables.HUGE_PAGES: "1",
    **dict.fromkeys(variables.PRODUCT_CACHES, variables.MOST_PRODUCTS),
}


@pytest.mark.parametrize(
    ("given", "not_chosen"),
    [
        ({}, set()),
        ({"GOMP_SPINCOUNT": "7"}, set()),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT"}),
        ({variables.HUGE_PAGES: "0"}, set()),
        ({variables.PRODUCT_CACHES[1]: "1024"}, set()),
    ],
)
def test_threads_and_memory_are_chosen_unless_the_operator_says_otherwise(
    given: dict[str, str], not_chosen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*CHOSEN, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    expected = {name: value for name, value in CHOSEN.items() if name not in not_chosen} | given
    environment = connection.environment()
    assert {name: environment[name] for name in expected} == expected
    told = {"PRELUDE_LOG_LEVEL", "PRELUDE_LOG_FORMAT"}  # as the server logs
    assert environment.keys() - told == (os.environ.keys() | expected.keys()) - told


def test_without_a_folder_to_write_to_the_kernel_is_compiled_at_each_start(tmp_path: Path) -> None:
    """Containers run from read-only file systems."""
    (tmp_path / "file").touch()
    script = "from server.engine.cpu.decode_kernel import attend_rows; print(type(attend_rows._cache).__name__)"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "folder")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "NullCache"
