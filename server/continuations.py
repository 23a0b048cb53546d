"""Tokenise a text as the continuation of another: a label after an input, a completion after its prompt.

Tokenizers treat the beginning of a text differently; many add a space. So a continuation is tokenised together with
its context, as in the LM Evaluation Harness (Gao et al.; ``_encode_pair``): its tokens are those that follow the
context's tokens. The context keeps the tokens that it has alone, because generation starts after them. If tokens
would merge across the border, the continuation gets other tokens that add the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_TAIL_CHARS = 256
"""Number of characters at the end of a context to tokenise again: more than any word has."""

_MAX_BREAK_CHARS = 64
"""The tail starts at a word, if one starts within this number of characters."""

_TAIL_TOKENS = 64
"""The same for a context given as tokens."""

_CONTEXT_TOKENS = 8

_ANCHORS = ("\n", ".", "a", "0", ")")
"""Texts to tokenise a continuation after, if it merges with its context."""


@dataclass(frozen=True, slots=True)
class Context:
    """The text that is continued.

    Attributes:
        token_ids: Its tokens, including special tokens.
        text: The text; None if only tokens were given.
    """

    token_ids: list[int]
    text: str | None = None


class ContinuationEncoder:
    """Tokenises continuations.

    Args:
        encode: Converts texts to token ids, without special tokens.
        decode: Converts token ids to text, including special tokens.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], decode: Callable[[list[int]], str]) -> None:
        self._encode = encode
        self._decode = decode

    def encode(self, context: Context, continuations: Sequence[str]) -> list[list[int]]:
        """Encode continuations of a context."""
        found = self._added_tokens(self._tail(context), continuations)
        return [
            ids if ids is not None else self._by_text(context, text)
            for ids, text in zip(found, continuations, strict=True)
        ]

    def encode_labels(self, context: Context, labels: Sequence[str]) -> tuple[Context | str, list[list[int]]]:
        """Encode labels as continuations of a context.

        Models are trained on words that include the space before them. So if a label merges with trailing spaces of
        the context, these spaces become part of all labels, as in the harness.

        Returns:
            The context, or its text without trailing spaces, and the tokens of each label after it.
        """
        found = self._added_tokens(self._tail(context), labels)
        if context.text is not None and any(ids is None for ids in found):
            shorter = context.text.rstrip()
            if shorter and shorter != context.text:
                spaces = context.text[len(shorter) :]
                moved = self._added_tokens(_tail_of(shorter), [spaces + label for label in labels])
                full = [ids for ids in moved if ids is not None]
                if len(full) == len(labels):
                    return shorter, full
        return context, [
            ids if ids is not None else self._by_text(context, label)
            for ids, label in zip(found, labels, strict=True)
        ]

    def _tail(self, context: Context) -> str:
        if context.text is not None:
            return _tail_of(context.text)
        return self._decode(context.token_ids[-_TAIL_TOKENS:])

    def _added_tokens(self, before: str, continuations: Sequence[str]) -> list[list[int] | None]:
        """The tokens that each continuation adds to those of a text; None if it changes them."""
        own, *joined = self._encode([before, *(before + text for text in continuations)])
        return [full[len(own) :] if full[: len(own)] == own else None for full in joined]

    def _by_text(self, context: Context, text: str) -> list[int]:
        """Tokens that add a text to a context with which it would merge."""
        last = context.token_ids[-_CONTEXT_TOKENS:]
        before = self._decode(last)

        def adds_text(ids: list[int]) -> bool:
            full = self._decode(last + ids)
            return full.startswith(before) and full[len(before) :] == text

        (alone,) = self._encode([text])
        if adds_text(alone):
            return alone
        candidates = [ids for anchor in _ANCHORS for ids in self._added_tokens(anchor, [text]) if ids]
        # A tokenizer may change texts, for example to lower case; then no tokens add the exact text.
        return next(filter(adds_text, candidates), candidates[0] if candidates else alone)


def continuations_of(tokenizer: Any) -> ContinuationEncoder:
    """A ContinuationEncoder for a tokenizer of transformers."""

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return ContinuationEncoder(encode, decode)


def _tail_of(text: str) -> str:
    if len(text) <= _TAIL_CHARS:
        return text
    tail = text[-_TAIL_CHARS:]
    spaces = (place for place in range(_MAX_BREAK_CHARS) if tail[place].isspace() and not tail[place + 1].isspace())
    return tail[next(spaces, -1) + 1 :]
