"""A check at start that loaded keys and values have the effect of computed ones, with this model and this backend."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from uuid import uuid4

from server.engine.types import ModelInfo, SoftPromptSource
from server.engine.vllm.use import Role
from server.errors import EngineStartError

NUM_TOP, NUM_COMPARED = 50, 10
"""The logprobs of the most likely tokens that are needed, and compared."""

FirstLogprobs = Callable[[list[int], Role | None, SoftPromptSource], Awaitable[Mapping[int, float]]]
"""The logprobs of the NUM_TOP most likely first tokens after a text, by token; empty if the request fails."""

TOLERANCES = {"float32": 0.01}
HALF_TOLERANCE = 0.3
"""Greatest difference of logprobs. Context that is ignored makes a difference of several nats."""

TEXT_TOKENS = 5


async def check_exactness(first_logprobs: FirstLogprobs, model: ModelInfo) -> None:
    """Compare the first token's logprobs after loaded and after computed positions.

    The positions are those of a text, computed and kept as a soft prompt of embeddings is.

    Args:
        first_logprobs: Runs a request with a role of the connector.
        model: The loaded model.

    Raises:
        EngineStartError: If they differ.
    """
    num_positions = min(2 * model.block_size + 3, model.max_model_len - TEXT_TOKENS - 1)
    if num_positions < 1:
        return
    tokens = [(7 * index + index * index) % model.vocab_size for index in range(num_positions + TEXT_TOKENS)]
    before, text = tokens[:num_positions], tokens[num_positions:]
    source = SoftPromptSource(
        digest=f"check-{uuid4().hex}", num_virtual_tokens=num_positions, is_key_values=False, path=""
    )
    await first_logprobs(before, Role.COMPUTE, source)
    loaded = await first_logprobs(text[:1] * num_positions + text, Role.LOAD, source)
    await first_logprobs(text, Role.DISCARD, source)
    computed = await first_logprobs(tokens, None, source)
    difference = difference_of(computed, loaded)
    tolerance = TOLERANCES.get(model.dtype, HALF_TOLERANCE)
    if difference > tolerance:
        raise EngineStartError(
            f"vLLM does not use loaded keys and values of {model.architecture} as it uses computed ones: logprobs "
            f"differ by {difference:.3g}, more than {tolerance}; soft prompts would give wrong answers"
        )


def difference_of(expected: Mapping[int, float], found: Mapping[int, float]) -> float:
    """The greatest difference of the most likely tokens' logprobs; infinite if one of them is missing or NaN."""
    best = sorted(expected, key=lambda token: -expected[token])[:NUM_COMPARED]
    if not best or not set(best) <= found.keys():
        return float("inf")
    greatest = max(abs(expected[token] - found[token]) for token in best)
    return greatest if all(math.isfinite(found[token] + expected[token]) for token in best) else float("inf")
