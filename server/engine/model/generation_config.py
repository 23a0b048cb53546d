"""Reads a checkpoint's ``generation_config.json``.

transformers' ``generate``, and so PEFT's, takes values from there that its caller omits. A value with a request field
becomes that field's default; other values become rules for every text. A value that the API would refuse in a request
is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from server.engine.generation_defaults import NO_RULES, GenerationDefaults, TokenRules

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS = 16, 1024
"""The limits of a request's field ``stop``."""

_WITHOUT_EFFECT: dict[str, tuple[object, ...] | None] = {
    # Metadata, and tokens that are read elsewhere.
    **dict.fromkeys(
        ("transformers_version", "bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    ),
    # Ways to compute.
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size")),
    **dict.fromkeys(("compile_config", "disable_compile", "continuous_batching_config", "low_memory")),
    # Additional outputs of generate.
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits")),
    **dict.fromkeys(("return_dict_in_generate", "renormalize_logits")),
    # Encoders, and assistant models, which do not change greedy tokens.
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "is_assistant")),
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")),
    **dict.fromkeys(("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size")),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_ensemble_weight", "speculation_type", "use_mtp")),
    # Beam search only; num_beams is reported.
    **dict.fromkeys(("early_stopping", "length_penalty", "diversity_penalty")),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
}
"""Names that never change an answer (None), and the values with which other names do not."""


@dataclass(slots=True)
class CheckpointGeneration:
    """The content of a ``generation_config.json``.

    Attributes:
        defaults: Defaults of requests.
        rules: Rules for every text.
        applied: Names and values of the defaults and rules.
        ignored: Names and values that would change answers, but are not supported.
    """

    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    rules: TokenRules = NO_RULES
    applied: dict[str, object] = field(default_factory=dict)
    ignored: dict[str, object] = field(default_factory=dict)

    def log(self) -> None:
        """Log the applied and the ignored values, one line each."""
        if self.applied:
            logger.info("defaults from generation_config.json, which requests override: %s", _listed(self.applied))
        if self.ignored:
            logger.warning("generation_config.json has settings that are not supported: %s", _listed(self.ignored))


def read_generation_config(
    config: GenerationConfig | None, *, vocab_size: int, max_model_len: int, eos_token_ids: tuple[int, ...]
) -> CheckpointGeneration:
    """Sort a checkpoint's generation configuration into defaults, rules and ignored values.

    Args:
        config: The file, as parsed by transformers; None if there is none.
        vocab_size: Width of the logits; a rule with a larger token id is ignored.
        max_model_len: Positions of one sequence; a ``max_length`` of at least this has no effect.
        eos_token_ids: The model's end-of-sequence tokens, which are never bad words.
    """
    found = CheckpointGeneration()
    values: dict[str, Any] = {} if config is None else config.to_dict()
    defaults: dict[str, object] = {}
    rules: dict[str, object] = {}
    for name, value in sorted(values.items()):
        if value is None or name.startswith("_") or _is_without_effect(name, value):
            continue
        if name == "max_length" and isinstance(value, int) and value >= max_model_len:
            continue
        if name == "do_sample" and value is True:
            continue  # the API's default
        if name == "temperature" and values.get("do_sample") is False:
            continue  # ignored by generate too
        try:
            if name in _DEFAULTS:
                attribute, read = _DEFAULTS[name]
                defaults[attribute] = read(value)
            elif name in _RULES:
                attribute, rule = _RULES[name]
                rules[attribute] = rule(value, vocab_size)
                if rules[attribute] == getattr(NO_RULES, attribute):
                    continue
            elif name == "do_sample":
                if value is not False:
                    raise ValueError("neither true nor false")
                defaults["temperature"] = 0.0
            else:
                raise ValueError("unknown")
        except (ValueError, TypeError):
            found.ignored[name] = value
        else:
            found.applied[name] = value
    ends = {(token,) for token in eos_token_ids}
    bad_words = rules.get("bad_words", ())
    if isinstance(bad_words, tuple):
        rules["bad_words"] = tuple(word for word in bad_words if word not in ends)
    found.defaults, found.rules = GenerationDefaults(**defaults), TokenRules(**rules)  # type: ignore[arg-type]
    return found


def _is_without_effect(name: str, value: object) -> bool:
    if name not in _WITHOUT_EFFECT:
        return False
    values = _WITHOUT_EFFECT[name]
    return values is None or value in values


def _number(least: float, most: float) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError
        return float(value)

    return read


def _count(least: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError
        return value

    return read


def _share(value: object) -> float:
    """``top_p``, in (0, 1]."""
    share = _number(0.0, 1.0)(value)
    if share == 0.0:
        raise ValueError
    return share


def _strings(value: object) -> tuple[str, ...]:
    items: list[object] = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    strings = tuple(item for item in items if isinstance(item, str) and 0 < len(item) <= MAX_STOP_STRING_CHARS)
    if len(strings) < len(items) or len(items) > MAX_STOP_STRINGS:
        raise ValueError
    return strings


def _token(value: object, vocab_size: int) -> int:
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError
    return value


def _tokens(value: object, vocab_size: int) -> tuple[int, ...]:
    items = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return tuple(_token(item, vocab_size) for item in items)


def _known_tokens(value: object, vocab_size: int) -> tuple[int, ...]:
    """Tokens to suppress, without those that are not in the vocabulary."""
    items = list(value)  # type: ignore[call-overload]
    if not all(type(item) is int for item in items):
        raise ValueError
    return tuple(item for item in items if 0 <= item < vocab_size)


def _words(value: object, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    words = tuple(_tokens(word, vocab_size) for word in list(value))  # type: ignore[call-overload]
    if () in words:
        raise ValueError
    return words


def _biases(value: object, vocab_size: int) -> tuple[tuple[tuple[int, ...], float], ...]:
    """``sequence_bias``: [[tokens, bias], ...] in JSON, or a mapping."""
    items = value.items() if isinstance(value, Mapping) else list(value)  # type: ignore[call-overload]
    biases = {_tokens(ids, vocab_size): _number(-1e38, 1e38)(bias) for ids, bias in items}
    if () in biases:
        raise ValueError
    return tuple(biases.items())


def _counted(least: int) -> Callable[[object, int], int]:
    return lambda value, _: _count(least)(value)


_DEFAULTS: dict[str, tuple[str, Callable[[object], object]]] = {
    "temperature": ("temperature", _number(0.0, 2.0)),
    "top_p": ("top_p", _share),
    "top_k": ("top_k", _count(-1)),
    "min_p": ("min_p", _number(0.0, 1.0)),
    "repetition_penalty": ("repetition_penalty", _number(0.01, 100.0)),
    "min_new_tokens": ("min_tokens", _count(0)),
    "max_new_tokens": ("max_tokens", _count(1)),
    "stop_strings": ("stop", _strings),
}
"""Attribute of ``GenerationDefaults`` and parser (with the range of requests), by transformers' name."""

_RULES: dict[str, tuple[str, Callable[[object, int], object]]] = {
    "sequence_bias": ("sequence_bias", _biases),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", _counted(0)),
    "bad_words_ids": ("bad_words", _words),
    "min_length": ("min_length", _counted(0)),
    "forced_bos_token_id": ("forced_bos_token_id", _token),
    "forced_eos_token_id": ("forced_eos_token_ids", _tokens),
    "suppress_tokens": ("suppress_tokens", _known_tokens),
    "begin_suppress_tokens": ("begin_suppress_tokens", _known_tokens),
}
"""Attribute of ``TokenRules`` and parser, by transformers' name."""


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_shortened(value)}" for name, value in values.items())


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
