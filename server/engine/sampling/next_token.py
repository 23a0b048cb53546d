"""What a step's token does to its sequence: the event that reports it, and whether the text ends."""

from __future__ import annotations

import time
from collections.abc import Collection
from math import isfinite, isnan

from server.engine.failures import failure_event
from server.engine.sampling.grammar_check import NO_WAY_ON
from server.engine.sampling.sampler import NO_TOKEN, NOT_FINITE
from server.engine.scheduling.sequence import Sequence
from server.engine.types import ErrorCode, FinishReason, Logprobs, TokenEvent

NOT_FINITE_TEXT = "the model computed a value that is not finite for this text"


def take_token(
    seq: Sequence,
    token: int,
    logprobs: Logprobs | None,
    class_logits: list[float] | None,
    *,
    eos_token_ids: Collection[int],
) -> TokenEvent:
    """Append the next token to a sequence.

    Args:
        seq: A running sequence.
        token: The token, or a negative value of ``sampler``.
        logprobs: Those of the token, if requested.
        class_logits: The labels' logits, if requested.
        eos_token_ids: The model's end-of-sequence tokens.

    Returns:
        The event; it has a finish reason or a failure if the caller has to end the sequence.
    """
    params = seq.request.params
    # A text without new tokens has no token that says so.
    scores = [entry.logprob for entry in seq.prompt_logprobs if entry] if params.max_tokens == 0 else []
    if token == NOT_FINITE or not all(map(isfinite, class_logits or ())) or any(map(isnan, scores)):
        return failure_event(seq.request_id, ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
    event = TokenEvent(request_id=seq.request_id, num_cached_tokens=seq.num_cached_tokens)
    if seq.num_new_tokens == 0:
        if seq.first_run is not None:
            event.queue_seconds = seq.first_run - seq.arrival
            event.prefill_seconds = time.monotonic() - seq.first_run
        if params.prompt_logprobs is not None:
            event.prompt_logprobs = seq.prompt_logprobs
        event.class_logits = class_logits
    if params.max_tokens > 0 and token != NO_TOKEN:
        seq.token_ids.append(token)
        event.token_ids.append(token)
        event.logprobs = None if logprobs is None else [logprobs]
        if seq.matcher is not None:
            seq.matcher.advance(token)
        if _ends(seq, token, eos_token_ids):
            seq.stop_token_id = event.stop_token_id = token
    error = _constraint_error(seq, token)
    is_complete = seq.matcher is not None and error is None and (token == NO_TOKEN or seq.matcher.is_finished)
    if seq.stop_token_id is not None or is_complete:
        event.finish_reason = FinishReason.STOP
    elif error is not None:
        event.failure = failure_event(seq.request_id, ErrorCode.CONSTRAINT, error).failure
    elif seq.num_new_tokens == params.max_tokens:
        event.finish_reason = FinishReason.LENGTH
    return event


def _ends(seq: Sequence, token: int, eos_token_ids: Collection[int]) -> bool:
    if token in seq.request.params.stop_token_ids:
        return True
    # A grammar allows an end-of-sequence token only at its end.
    return token in eos_token_ids and (not seq.request.params.ignore_eos or seq.matcher is not None)


def _constraint_error(seq: Sequence, token: int) -> str | None:
    """Why a sequence cannot follow its constraint after this token; None if it can."""
    if seq.matcher is None or seq.request.params.constraint is None:
        return None
    error = seq.matcher.error
    if error is None and token == NO_TOKEN and not seq.matcher.is_complete:
        error = NO_WAY_ON
    return error
