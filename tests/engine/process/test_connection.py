"""The engine process's surroundings."""

from __future__ import annotations

import os

import pytest

from server.engine.model import environment as variables
from server.engine.process import connection

CHOSEN = {
    "GOMP_SPINCOUNT": variables.SPIN_COUNT,
    variables.HUGE_PAGES: "1",
    **dict.fromkeys(variables.PRODUCT_CACHES, variables.MAX_PRODUCTS),
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
