"""Tests of what is served on a CUDA device: skipped, saying so, where torch finds none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.conftest import make_engine, make_family

__all__ = ["make_engine", "make_family"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            # Triton's and CUDA's own, which differ with the GPU and the driver.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))
