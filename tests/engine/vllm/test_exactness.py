"""The check at start: whether loaded keys and values have the effect of computed ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest

from server.engine.types import ModelInfo, SoftPromptSource
from server.engine.vllm.exactness import NUM_TOP, check_exactness, difference_of
from server.engine.vllm.use import Role
from server.errors import EngineStartError

pytestmark = pytest.mark.anyio


@dataclasses.dataclass
class Fake:
    """Runs requests on a model whose logprobs follow from the sum of its text, with an error if it was loaded."""

    error: float = 0.0
    is_failing: bool = False
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    roles: list[Role | None] = dataclasses.field(default_factory=list)

    async def __call__(
        self, token_ids: list[int], role: Role | None, source: SoftPromptSource
    ) -> Mapping[int, float]:
        self.roles.append(role)
        total = sum(token_ids)
        if role is Role.COMPUTE:
            assert len(token_ids) == source.num_virtual_tokens
            self.kept[source.identity] = total
        elif role is Role.LOAD:
            if self.is_failing:
                return {}
            rest = token_ids[source.num_virtual_tokens :]
            assert token_ids == rest[:1] * source.num_virtual_tokens + rest
            total = self.kept[source.identity] + sum(rest)
        elif role is Role.DISCARD:
            del self.kept[source.identity]
        shift = self.error if role is Role.LOAD else 0.0
        return {token: -float((total + token) % 97) - shift for token in range(NUM_TOP)}


def model(dtype: str = "float32", max_model_len: int = 256) -> ModelInfo:
    return ModelInfo(
        architecture="Llama",
        dtype=dtype,
        device="cpu",
        embedding_width=64,
        num_layers=3,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=197,
        max_model_len=max_model_len,
        block_size=32,
        num_blocks=10,
        eos_token_ids=(),
    )


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float32", 0.005), ("bfloat16", 0.2)])
async def test_a_small_difference_is_rounding(dtype: str, error: float) -> None:
    fake = Fake(error)
    await check_exactness(fake, model(dtype=dtype))
    assert fake.roles == [Role.COMPUTE, Role.LOAD, Role.DISCARD, None]
    assert fake.kept == {}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.02), ("bfloat16", 0.4), ("bfloat16", math.nan)])
async def test_another_answer_is_refused_with_its_difference(dtype: str, error: float) -> None:
    with pytest.raises(EngineStartError, match="does not use loaded keys and values"):
        await check_exactness(Fake(error), model(dtype=dtype))


async def test_a_load_that_fails_is_refused() -> None:
    with pytest.raises(EngineStartError, match="inf"):
        await check_exactness(Fake(is_failing=True), model())


async def test_a_model_without_room_is_not_checked() -> None:
    fake = Fake()
    await check_exactness(fake, model(max_model_len=6))
    assert fake.roles == []


def test_a_token_that_is_missing_is_another_answer() -> None:
    assert difference_of({1: -1.0, 2: -2.0}, {1: -1.5, 2: -2.0}) == 0.5
    assert difference_of({1: -1.0, 2: -2.0}, {1: -1.0, 3: -2.0}) == math.inf
    assert difference_of({}, {1: -1.0}) == math.inf
