"""The engine process's surroundings."""

from __future__ import annotations

import os
import signal

import pytest

from server.config import EngineSettings
from server.engine.messages import DEVICE_FAILED_STATUS
from server.engine.model import environment as variables
from server.engine.process.command import environment
from server.engine.process.started_process import how_it_ended

CHOSEN = {
    "GOMP_SPINCOUNT": variables.SPIN_COUNT,
    variables.HUGE_PAGES: "1",
    **variables.KEPT_MEMORY,
    **dict.fromkeys(variables.PRODUCT_CACHES, variables.MAX_PRODUCTS),
}


@pytest.mark.parametrize(
    ("given", "not_chosen"),
    [
        ({}, set()),
        ({"GOMP_SPINCOUNT": "7"}, set()),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT"}),
        ({variables.HUGE_PAGES: "0"}, set()),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, set()),
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
    with environment(EngineSettings(model="m")) as chosen:
        assert {name: chosen[name] for name in expected} == expected
        told = {"PRELUDE_LOG_LEVEL", "PRELUDE_LOG_FORMAT"}  # as the server logs
        assert chosen.keys() - told == (os.environ.keys() | expected.keys()) - told


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (1, "ended with status 1"),
        (DEVICE_FAILED_STATUS, "ended with status 3: the device failed"),
        (-signal.SIGKILL, "was ended by SIGKILL"),
        (-99, "was ended by signal 99"),
        (None, "cannot be killed"),
    ],
)
def test_the_end_of_a_process_is_described(status: int | None, words: str) -> None:
    assert how_it_ended(status) == words
