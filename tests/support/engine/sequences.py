"""Sequences for tests of the scheduler and the sampler."""

from __future__ import annotations

from typing import Any

from server.engine.scheduling.sequence import Sequence
from server.engine.types import GenerateRequest, SamplingParams, SoftPromptSource


def make_sequence(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    soft_prompt: SoftPromptSource | None = None,
    *,
    arrival: float = 0.0,
    **fields: Any,
) -> Sequence:
    """A sequence of a request with these fields."""
    request = GenerateRequest(
        request_id=request_id, prompt_token_ids=prompt_token_ids, params=params, soft_prompt=soft_prompt, **fields
    )
    return Sequence(request, arrival=arrival)
