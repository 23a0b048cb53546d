"""Text of a grammar to llguidance's matcher, within limits. Imports neither torch nor transformers."""

from __future__ import annotations

import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_ERROR_CHARS = 500
"""Of what llguidance says about a grammar: it quotes it."""

NO_WAY_ON = "no token of this model's vocabulary satisfies the constraint here"
"""The error if a constraint cannot be satisfied, or not with the model's tokens."""

LIMITS = LLParserLimits(
    # 1 to 2 kB each; what has more of them is an automaton that nobody meant.
    max_lexer_states=20_000,
    # About 7 ms of one mask.
    step_lexer_fuel=100_000,
    verbose_errors=False,
)

STACK_BYTES = 256 * 1024 * 1024
"""Of a compiling thread; address space, not memory. Rules in a chain overflow 8 MiB at some thousand of them; a text
of 64 KiB has room for ten thousand at most, which take a tenth of this."""


class GrammarError(Exception):
    """A constraint cannot be used: it is malformed, too large or cannot be satisfied."""


def compile_grammar(tokenizer: LLTokenizer, lark: str) -> LLMatcher:
    """Compile a grammar and compute its first mask, where some grammars that are too large fail.

    Args:
        tokenizer: The model's tokens.
        lark: The grammar, in llguidance's Lark syntax.

    Raises:
        GrammarError: If it cannot be used.
    """
    lowlevel = LLMatcher(tokenizer, lark, log_level=0, limits=LIMITS)
    error = error_of(lowlevel)
    if error is None:
        trial = lowlevel.deep_copy()
        trial.compute_bitmask()
        error = error_of(trial)
    if error is not None:
        raise GrammarError(error)
    return lowlevel


def error_of(lowlevel: LLMatcher) -> str | None:
    """Why no token can follow; None if one can."""
    if not lowlevel.is_error():
        return None
    # What stands before the quoted grammar and the parser's state.
    text = " ".join(re.split(r"\n +1 \| |\n<", lowlevel.get_error(), maxsplit=1)[0].split())
    if text.startswith("NoExtension"):
        return NO_WAY_ON
    if len(text) > MAX_ERROR_CHARS:  # it quotes the constraint in the middle
        text = f"{text[: MAX_ERROR_CHARS // 2]} ... {text[5 - MAX_ERROR_CHARS // 2 :]}"
    return text or "it is too complex"
