"""Why a sequence is refused or fails, and the event that says so."""

from __future__ import annotations

from server.engine.scheduling.sequence import Sequence
from server.engine.types import Capability, ErrorCode, ModelInfo, RequestFailure, TokenEvent


def refusal_of(seq: Sequence, model: ModelInfo, *, scores_prompts: bool) -> str | None:
    """Why a model can never serve a sequence; None if it can.

    Args:
        seq: The sequence.
        model: The resident model.
        scores_prompts: Whether the engine can compute the logits at all positions of a text.
    """
    params = seq.request.params
    if Capability.ADAPTERS not in model.capabilities and any(own.request.adapter for own in seq.members):
        return model.refusal(Capability.ADAPTERS)
    wrong = seq.unknown_token_id(model.vocab_size)
    if wrong is not None:
        return f"token id {wrong} is not in the vocabulary of {model.vocab_size} tokens"
    if params.prompt_logprobs_start < 0:
        return f"prompt_logprobs_start {params.prompt_logprobs_start} is before the text"
    if seq.followers and (params.prompt_logprobs is not None or params.classify):
        return "the members of an ensemble that generates together score no text"
    if params.prompt_logprobs is not None and not scores_prompts:
        return f"{model.architecture} gives no logprobs of the text"
    if params.classify and not scores_prompts:
        return f"{model.architecture} gives no hidden states to classify by"
    sources = (seq.request.soft_prompt, seq.request.adapter)
    if params.classify and all(source is None or source.num_labels is None for source in sources):
        return "only a soft prompt or an adapter with a classification head classifies"
    return None


def reason(error: Exception) -> str:
    """The message for a sequence whose computation raised."""
    return f"the model failed to compute this request ({named(error)})"


def named(error: BaseException) -> str:
    """The type and text of an error."""
    return f"{type(error).__name__}: {error}"


def fail(seq: Sequence, code: ErrorCode, message: str) -> TokenEvent:
    """Mark a sequence that is not scheduled as ended, and return its last event."""
    seq.end_reason = code
    return failure_event(seq.request_id, code, message)


def failure_event(request_id: str, code: ErrorCode, message: str) -> TokenEvent:
    """The last event of a request that is refused or failed."""
    return TokenEvent(request_id=request_id, failure=RequestFailure(code, message))
