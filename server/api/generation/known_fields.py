"""Fields that other servers support and this one does not: some are rejected by name, others are ignored.

A field that would change the output is rejected unless its value has no effect, because an output without it would
look right and be wrong. A field that changes no token is ignored, with a reason given here. Fields that are neither
in these tables nor in a body are ignored silently. docs/generation.md has the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import model_validator

from server.api.request_body import RequestBody
from server.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Refused:
    """How a field is rejected.

    Attributes:
        no_ops: Accepted values without effect, besides null and empty values.
        instead: Advice for the client.
        same_as: Field of this server; its value is accepted here too, because clients send both names.
    """

    no_ops: tuple[object, ...] = ()
    instead: str = "leave it out"
    same_as: str | None = None


_STRUCTURE = "send structured_outputs"
_SOFT_PROMPT = "name a soft prompt by model or prompt_id"
_ADAPTER = "name an adapter by model or adapter_id"
_TOOLS = "send tools and tool_choice"

EVERYWHERE: dict[str, Refused] = {
    # Beams.
    "use_beam_search": Refused((False,), "send n and read logprobs"),
    "num_beams": Refused((1,), "send n and read logprobs"),
    "length_penalty": Refused((1, 1.0)),
    "early_stopping": Refused((False,)),
    "diversity_penalty": Refused((0,)),
    # Which tokens may be chosen.
    "allowed_token_ids": Refused(instead="send logit_bias or structured_outputs"),
    "bad_words": Refused(instead="send logit_bias"),
    "logits_processors": Refused(),
    "logit_processors": Refused(),
    "custom_token_bans": Refused(instead="send logit_bias"),
    "ban_eos_token": Refused((False,), "send ignore_eos or min_tokens"),
    "no_repeat_ngram_size": Refused((0,)),
    "repeat_penalty": Refused((1,), "send repetition_penalty", "repetition_penalty"),
    "encoder_repetition_penalty": Refused((1,)),
    "do_sample": Refused((True,), "send temperature 0"),
    "typical_p": Refused((1, 0)),
    "top_a": Refused((0,)),
    "top_h": Refused((0, 1)),
    "top_n_sigma": Refused((0, -1)),
    "tfs": Refused((1,)),
    "tfs_z": Refused((1,)),
    "epsilon_cutoff": Refused((0,)),
    "eta_cutoff": Refused((0,)),
    "penalty_alpha": Refused((0,)),
    "mirostat": Refused((0, False)),
    "mirostat_mode": Refused((0,)),
    "dry_multiplier": Refused((0,)),
    "xtc_probability": Refused((0,)),
    "smoothing_factor": Refused((0,)),
    "dynatemp_range": Refused((0,)),
    "guidance_scale": Refused((1,)),
    "negative_prompt": Refused(),
    "watermarking": Refused((False,)),
    # Lengths and ends, by other names.
    "num_return_sequences": Refused((1,), "send n", "n"),
    "max_length": Refused(instead="send max_tokens"),
    "max_new_tokens": Refused((), "send max_tokens", "max_tokens"),
    "n_predict": Refused((-1,), "send max_tokens", "max_tokens"),
    "num_predict": Refused((-1,), "send max_tokens", "max_tokens"),
    "min_new_tokens": Refused((0,), "send min_tokens", "min_tokens"),
    "stop_sequences": Refused((), "send stop", "stop"),
    "stopping_strings": Refused((), "send stop", "stop"),
    "repetition_detection": Refused(),
    "thinking_token_budget": Refused((-1,)),
    "truncate_prompt_tokens": Refused(instead="shorten the text"),
    "truncate": Refused(instead="shorten the text"),
    # Structure, by other names.
    "guided_whitespace_pattern": Refused(instead=_STRUCTURE),
    "guided_decoding": Refused(instead=_STRUCTURE),
    "grammar": Refused(instead=_STRUCTURE),
    "ebnf": Refused(instead=_STRUCTURE),
    "regex": Refused(instead=_STRUCTURE),
    "json_schema": Refused(instead="send response_format or structured_outputs"),
    "structural_tag": Refused(instead=_STRUCTURE),
    # Adapters, by other names.
    "lora_path": Refused((), _ADAPTER, "adapter_id"),
    "lora_request": Refused(instead=_ADAPTER),
    "prompt_adapter_request": Refused(instead=_SOFT_PROMPT),
    # Contents of the response.
    "prompt_logprobs": Refused((False,), "send echo with logprobs"),
    "logprob_token_ids": Refused(instead="send logprobs"),
    "logprobs_mode": Refused(("raw_logprobs",)),
    "return_tokens_as_token_ids": Refused((False,), "send return_token_ids"),
    "detokenize": Refused((True,), "send return_token_ids"),
    # The text.
    "prompt_embeds": Refused(instead="upload a soft prompt"),
    # The Python client's name for additional fields.
    "extra_body": Refused(instead="send its fields at the top level"),
    # Between servers.
    "cache_salt": Refused(instead="use a key of a separate tenant: tenants do not share the cache"),
    "kv_transfer_params": Refused(),
    "ec_transfer_params": Refused(),
    "vllm_xargs": Refused(),
}
"""Rejected by completions and chat completions."""

COMPLETIONS: dict[str, Refused] = {
    # With as many candidates as choices, there is nothing to select.
    "best_of": Refused((1,), "send n", "n"),
    "suffix": Refused(),
    "tools": Refused(instead="use /v1/chat/completions"),
    "functions": Refused(instead="use /v1/chat/completions"),
    "tool_choice": Refused(("none", "auto"), "use /v1/chat/completions"),
    "top_logprobs": Refused((0,), "send logprobs with their number"),
    "chat_template": Refused(instead="use /v1/chat/completions"),
    "chat_template_kwargs": Refused(instead="use /v1/chat/completions"),
    "continue_final_message": Refused((False,), "use /v1/chat/completions"),
    "documents": Refused(instead="use /v1/chat/completions"),
    "reasoning_effort": Refused(instead="use /v1/chat/completions"),
}
"""Rejected by completions only."""

CHAT: dict[str, Refused] = {
    # With as many candidates as choices, there is nothing to select.
    "best_of": Refused((1,), "send n", "n"),
    "suffix": Refused(instead="use /v1/completions"),
    "apply_format": Refused((True,), "chat always applies the format of a soft prompt"),
    "echo": Refused((False,), "send continue_final_message"),
    # Templates come only from the model: a template is a program.
    "chat_template": Refused(instead="send chat_template_kwargs"),
    "functions": Refused(instead=_TOOLS),
    "function_call": Refused(("none", "auto"), _TOOLS),
    "modalities": Refused((["text"],), "only text is supported"),
    "audio": Refused(instead="only text is supported"),
    "web_search_options": Refused(instead=_TOOLS),
    "verbosity": Refused(("medium",), "describe it in the prompt"),
    "enable_thinking": Refused(instead="send chat_template_kwargs"),
    "thinking": Refused(instead="send chat_template_kwargs"),
    "include_reasoning": Refused((True,)),
    "separate_reasoning": Refused((False,)),
    "return_prompt_text": Refused((False,), "send return_token_ids"),
}
"""Rejected by chat completions only."""

CLASSIFY: dict[str, Refused] = {
    "truncate_prompt_tokens": EVERYWHERE["truncate_prompt_tokens"],
    "activation": Refused((True,)),
    "use_activation": Refused((True,)),
    "softmax": Refused((True,)),
}
"""Rejected by classification."""

_OPENAI_BOOKKEEPING = "OpenAI's own bookkeeping"
_SPEED = "affects only the speed of the answer"
_RENDERED = "of vLLM's render endpoints, and ignored by vLLM elsewhere"
_MEDIA = "for images and audio, which are rejected"

IGNORED: dict[str, str] = {
    "safety_identifier": _OPENAI_BOOKKEEPING,
    "metadata": _OPENAI_BOOKKEEPING,
    "store": _OPENAI_BOOKKEEPING,
    "prompt_cache_key": _SPEED,
    "prompt_cache_retention": _SPEED,
    "cache_prompt": _SPEED,
    "prediction": _SPEED,
    "stream_interval": _SPEED,
    "keep_alive": _SPEED,
    "guided_decoding_backend": _SPEED,
    "request_id": "the server sets the id; send the header X-Request-ID",
    "session_id": _SPEED,
    "truncation_side": "only with truncate_prompt_tokens, which is refused",
    "spaces_between_special_tokens": "only for tokenizers written in Python",
    "media_io_kwargs": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "return_token_offsets": _RENDERED,
    "return_mm_kwargs": _RENDERED,
    "routed_experts_prompt_start": "refers to data that this server does not return",
}
"""Ignored by both, with the reason why that changes no output."""


class KnownFieldsBody(RequestBody):
    """A body that rejects the fields in ``unsupported`` by name."""

    unsupported: ClassVar[Mapping[str, Refused]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        if isinstance(value, dict):
            refuse_unsupported(value, cls.unsupported)
        return value


def refuse_unsupported(body: Mapping[str, Any], refused: Mapping[str, Refused]) -> None:
    """Reject fields that this server does not support.

    Args:
        body: JSON object of a request, before validation.
        refused: Fields that the route rejects.

    Raises:
        UnsupportedError: If there is such a field; names the first one.
    """
    for name, value in body.items():
        how = refused.get(name)
        if how is None or value is None or value in ([], {}, "") or any(_same(value, no_op) for no_op in how.no_ops):
            continue
        if how.same_as is not None and _same(value, body.get(how.same_as)):
            continue
        raise UnsupportedError(f"{name}: not supported by this server; {how.instead}", param=name)


def _same(one: Any, other: Any) -> bool:
    """Equality in which ``true`` is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
