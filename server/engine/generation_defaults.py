"""The contents of a checkpoint's ``generation_config.json``: defaults of requests, and rules for every text."""

from __future__ import annotations

import msgspec

Bias = tuple[tuple[int, ...], float]


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults for fields that a request leaves out; None keeps the API's default.

    The fields are those of ``SamplingParams``, except for these:

    Attributes:
        max_tokens: Maximum number of new tokens, if it is less than the API's default.
        stop: Strings that end the text.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None


class TokenRules(msgspec.Struct, frozen=True, kw_only=True):
    """Rules for every generated text, which no field of a request changes.

    Attributes:
        sequence_bias: (tokens, bias): added to the logit of the last token if the text ends with the ones before it.
        no_repeat_ngram_size: N-grams of this size occur at most once in the text, including the prompt; 0 is no rule.
        bad_words: Sequences of tokens that are never completed.
        min_length: Minimum number of tokens, including the prompt, before an end of sequence may be chosen.
        forced_bos_token_id: The token after a prompt of one token.
        forced_eos_token_ids: One of these is the last token that ``max_tokens`` allows.
        suppress_tokens: Tokens that are never chosen.
        begin_suppress_tokens: Tokens that are never chosen as the first new token.
    """

    sequence_bias: tuple[Bias, ...] = ()
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()


NO_RULES = TokenRules()
