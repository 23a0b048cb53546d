"""From our sampling parameters to vLLM's, and from vLLM's logprobs to ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.sampling_params import SamplingParams as VllmSamplingParams

from server.engine.sampling.grammars import lark_of
from server.engine.types import MIN_LOGPROB, Logprobs, SamplingParams
from server.engine.vllm.use import Use

MAX_SEED = 2**63 - 1


def vllm_params(params: SamplingParams, use: Use, eos_token_ids: Sequence[int]) -> VllmSamplingParams:
    """Convert the parameters of a request.

    Args:
        params: Ours; without a classification.
        use: The request's soft prompt.
        eos_token_ids: The model's end-of-sequence tokens. vLLM is told of them as stop tokens, because it knows only
            one as the end of a text.

    Raises:
        ValueError: If vLLM refuses a value.
    """
    constraint = params.constraint
    ends = () if params.ignore_eos and constraint is None else tuple(eos_token_ids)
    return VllmSamplingParams(
        max_tokens=max(params.max_tokens, 1),  # vLLM computes no text without a new token
        min_tokens=0 if constraint is not None else min(params.min_tokens, max(params.max_tokens, 1)),
        temperature=0.0 if params.is_greedy else params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        # By default vLLM reads no cache for these, and ignores what the connector offers without a word.
        skip_reading_prefix_cache=False,
        seed=None if params.seed is None else params.seed & MAX_SEED,
        stop_token_ids=list(dict.fromkeys((*params.stop_token_ids, *ends))),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if constraint is None else StructuredOutputsParams(grammar=lark_of(constraint)),
        extra_args={"kv_transfer_params": use.to_params()},
    )


def one_token(use: Use, *, logprobs: int | None = None) -> VllmSamplingParams:
    """The parameters of a request for its effect on the connector, or for its first token's logprobs."""
    return VllmSamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=logprobs,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": use.to_params()},
    )


def logprobs_of(entry: Mapping[int, Any], token_id: int, num_top: int) -> Logprobs:
    """The logprobs at one position.

    Args:
        entry: vLLM's logprob of the token and of the most likely ones, by token id.
        token_id: The token.
        num_top: Most likely tokens to report.
    """
    best = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[1].rank))[:num_top]
    top = [(other, max(found.logprob, MIN_LOGPROB)) for other, found in best]
    return Logprobs(max(entry[token_id].logprob, MIN_LOGPROB), top)


def prompt_logprobs_of(
    entries: Sequence[Mapping[int, Any] | None], token_ids: Sequence[int], *, start: int, num_top: int
) -> list[Logprobs | None]:
    """The logprobs of a text's tokens from ``start`` on.

    vLLM has entries for placeholders too, or for some of them, and those of tokens that follow one are made of
    whatever was in memory. So entries are counted from the end, and the first token of a text has none.
    """
    found: list[Logprobs | None] = []
    for index in range(start, len(token_ids)):
        entry = entries[index - len(token_ids)] if index > 0 else None
        found.append(None if entry is None else logprobs_of(entry, token_ids[index], num_top))
    return found
