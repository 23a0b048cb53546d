"""Tests on a CUDA device, which are skipped with a reason if torch finds none."""

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
            # Warnings of Triton and CUDA, which differ with the GPU and the driver.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))
