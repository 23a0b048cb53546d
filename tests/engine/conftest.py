"""Fixtures of the engine's tests: families of models, and engines that are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.model.platform import Platform
from tests.support.engine.harness import Family
from tests.support.engine.harness import make_family as harness_make_family


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            made[name] = harness_make_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def llama(make_family: Callable[[str], Family]) -> Family:
    return make_family("llama")


@pytest.fixture
def make_engine() -> Iterator[Callable[..., LLMEngine]]:
    engines: list[LLMEngine] = []

    def make(family: Family, platform: Platform | None = None, **settings: Any) -> LLMEngine:
        defaults: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 4 * 2**20}
        options = EngineSettings(model=str(family.path), **{**defaults, **settings})
        engine = LLMEngine(options, platform=platform)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
