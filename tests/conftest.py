"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels are tested in its interpreter then. Triton reads this when it is imported, which torch may do
    # long before those tests, and nobody else reads it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
