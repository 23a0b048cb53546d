"""Sequences for tests of the scheduler and the sampler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.engine.scheduling.sequence import Sequence
from server.engine.types import GenerateRequest, Member, SamplingParams, SoftPromptSource


def make_sequence(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    soft_prompt: SoftPromptSource | None = None,
    *,
    arrival: float = 0.0,
    others: Iterable[SoftPromptSource | None] = (),
    **fields: Any,
) -> Sequence:
    """A sequence of a request with these fields; ``others`` are the soft prompts of an ensemble's other members."""
    request = GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        params=params,
        soft_prompt=soft_prompt,
        others=tuple(Member(soft_prompt=one) for one in others),
        **fields,
    )
    return Sequence(request, arrival=arrival)
