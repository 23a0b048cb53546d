"""Families that the native engine refuses, for the types that PEFT can make for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine.harness import ALL_PEFT_CONFIGS, CONTEXT, check_that_the_store_takes_them
from tests.support.vllm import FALCON_ROWS, ONE_HEAD, make_vllm_family, needs_vllm, questions
from tests.support.vllm_engine import Engine

pytestmark = [needs_vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bloom", tuple(ALL_PEFT_CONFIGS)),
        ("falcon_multi_query", (*FALCON_ROWS, *ONE_HEAD)),
        ("falcon_grouped", FALCON_ROWS),
        ("gptj", tuple(ALL_PEFT_CONFIGS)),
    ],
)
def test_all_types_equal_peft_in_one_batch(name: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    family = make_vllm_family(name, tmp_path, keys)
    with Engine(family, 2**22, max_model_len=CONTEXT) as engine:
        check_that_the_store_takes_them(family, engine.engine.model)
        for _ in range(2):  # the second time, texts and soft prompts are in the prefix cache
            engine.check(questions(family, 33))
        assert engine.engine.stats.prefix_cache_hits > 0
