"""Fixtures and settings of all tests."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
import typer.testing
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.api_fixtures", "tests.support.adapter_fixtures", "tests.support.demo_server"]

SLOW_FOLDERS = [Path(__file__).parent / name for name in ("clients", "docker", "e2e")]
"""Folders whose tests start processes."""

# A busy machine must not fail a test.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# Tests call hundreds of commands and create hundreds of clients: what each would build again is built once.
for _module, _name in ((typer.testing, "_get_command"), (httpx._transports.default, "create_ssl_context")):
    setattr(_module, _name, cache(getattr(_module, _name)))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts background commands so, and their children ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels are tested in its interpreter. Triton reads this variable at import, and torch
    # may import it long before those tests. No other code reads it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was() -> Iterator[None]:
    """Restore logging: ``prelude serve`` in a test logs to a stream that is closed after that test."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the folders that start processes as slow, and run files with slow tests first.

    With two workers, none is left with a long file at the end.
    """
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in SLOW_FOLDERS):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
