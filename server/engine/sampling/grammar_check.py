"""Compiles a grammar to an llguidance matcher, within limits. Imports neither torch nor transformers."""

from __future__ import annotations

import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_ERROR_CHARS = 500
"""Maximum length of an error, because llguidance quotes the grammar."""

NO_WAY_ON = "no token of this model's vocabulary satisfies the constraint here"
"""The error if a constraint cannot be satisfied, in general or by the model's tokens."""

LIMITS = LLParserLimits(
    # 1 to 2 kB each; larger automata are not useful.
    max_lexer_states=20_000,
    # About 7 ms per mask.
    step_lexer_fuel=100_000,
    verbose_errors=False,
)

STACK_BYTES = 256 * 1024 * 1024
"""Stack of a compiling thread (address space, not memory). A chain of some thousand rules overflows 8 MiB. A grammar
of 64 KiB has at most ten thousand rules, which take a tenth of this."""


class GrammarError(Exception):
    """A constraint cannot be used: it is malformed, too large or cannot be satisfied."""


def compile_grammar(tokenizer: LLTokenizer, lark: str) -> LLMatcher:
    """Compile a grammar and compute its first mask, because some grammars fail only then.

    Args:
        tokenizer: The model's tokens.
        lark: The grammar, in llguidance's Lark syntax.

    Raises:
        GrammarError: If it is malformed, too large or cannot be satisfied.
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
    """The error of a matcher; None if it has none."""
    if not lowlevel.is_error():
        return None
    # The part before the quoted grammar and the parser's state.
    text = " ".join(re.split(r"\n +1 \| |\n<", lowlevel.get_error(), maxsplit=1)[0].split())
    if text.startswith("NoExtension"):
        return NO_WAY_ON
    if len(text) > MAX_ERROR_CHARS:  # the middle quotes the constraint
        text = f"{text[: MAX_ERROR_CHARS // 2]} ... {text[5 - MAX_ERROR_CHARS // 2 :]}"
    return text or "it is too complex"
