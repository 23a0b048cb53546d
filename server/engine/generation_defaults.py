"""What a checkpoint's ``generation_config.json`` sets: defaults of requests, and rules for every text."""

from __future__ import annotations

import msgspec

Bias = tuple[tuple[int, ...], float]


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request gets where it does not say otherwise; None leaves the API's own default.

    Attributes:
        temperature: As in ``SamplingParams``; so are the next five.
        top_p: Likewise.
        top_k: Likewise.
        min_p: Likewise.
        repetition_penalty: Likewise.
        min_tokens: Likewise.
        max_tokens: New tokens of a request that sets no limit, where that is less than the API's default.
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
    """What holds for every text that is generated, since no field of a request speaks of it.

    Attributes:
        sequence_bias: Added to the logit of a sequence's last token where the text ends with the others.
        no_repeat_ngram_size: So many tokens in a row stand in the text, prompt included, once at most; 0 is no rule.
        bad_words: Sequences of tokens that are never completed.
        min_length: Tokens of the text, prompt included, before which no end of sequence is chosen.
        forced_bos_token_id: The token after a text of one token.
        forced_eos_token_ids: One of these is the last token that ``max_tokens`` allows.
        suppress_tokens: Never chosen.
        begin_suppress_tokens: Never chosen as the first new token.
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
