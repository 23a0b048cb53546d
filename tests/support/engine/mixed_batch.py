"""A mixed batch of any tested family against PEFT: the same check on GPUs, and on CPUs by torch's attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig

from server.engine.llm_engine import LLMEngine
from tests.support.engine.families import FAMILIES
from tests.support.engine.harness import (
    CONFIGS,
    MORE_CONFIGS,
    PEFT_CONFIGS,
    SHAPE,
    Family,
    add,
    greedy,
    make_family,
    random_text,
    run,
    tokens,
)

EVERY = CONFIGS | MORE_CONFIGS | FAMILIES
MAX_TOKENS = 14
LONG = 4096
"""Positions of the family "long"."""


def make(name: str, folder: Path) -> Family:
    """A family of ``EVERY``, or "long"."""
    config: PreTrainedConfig = (
        LlamaConfig(**{**SHAPE, "max_position_embeddings": LONG}) if name == "long" else EVERY[name]()
    )
    return make_family(name, folder, PEFT_CONFIGS, config)


def answers(
    engine: LLMEngine, family: Family, requests: dict[str, tuple[str | None, list[int]]], max_tokens: int
) -> dict[str, list[int]]:
    """The engine's tokens for requests that run together."""
    for request_id, (key, text) in requests.items():
        add(engine, request_id, text, greedy(max_tokens), soft_prompt=family.source(key))
    return {request_id: tokens(outputs) for request_id, outputs in run(engine).items()}


def check_mixed_batch(name: str, family: Family, make_engine: Callable[[], LLMEngine], turns: int) -> LLMEngine:
    """Compare all soft prompts of a family and none, ``turns`` times each with new texts, with PEFT.

    Returns:
        The engine.
    """
    rng, engine = random.Random(name), make_engine()
    requests, want = {}, {}
    for index, key in enumerate([*family.soft_prompts, None] * turns):
        requests[f"r{index}"] = key, random_text(rng, 1, 60)
        want[f"r{index}"] = family.expected(*requests[f"r{index}"], MAX_TOKENS)
    assert answers(engine, family, requests, MAX_TOKENS) == want
    return engine
