"""What all tests share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.support.api_fixtures", "tests.support.demo_server"]

# A busy machine is no fault of what is tested.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

if not torch.cuda.is_available():
    # Triton's kernels are tested in its interpreter then. Triton reads this when it is imported, which torch may do
    # long before those tests, and nobody else reads it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was() -> Iterator[None]:
    """``prelude serve``, run inside a test, sends the process's log to a stream that ends with that test."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)
