"""The families of ``tests/gpu`` without a GPU: their models, soft prompts and answers are those of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.llm_engine import LLMEngine
from tests.support.engine.mixed_batch import EVERY, check_mixed_batch, make
from tests.support.engine.platforms import PlainPlatform

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", EVERY)
def test_a_mixed_batch_equals_peft(name: str, tmp_path: Path, make_engine: Callable[..., LLMEngine]) -> None:
    family = make(name, tmp_path)
    check_mixed_batch(name, family, lambda: make_engine(family, PlainPlatform(), max_num_seqs=12), turns=1)
