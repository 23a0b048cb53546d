"""Tokens of a text that continues another: a label behind an input, a completion behind its prompt.

Tokenizers treat the beginning of a text differently; most put a space there. So a continuation is tokenised together
with what it continues, as the LM Evaluation Harness does it (Gao et al.; ``_encode_pair``): its tokens are those that
both texts together have behind the tokens of the first. The first text's tokens stay what a server makes of it
alone, because generation begins behind them. Where the two together have other tokens at the border, the
continuation's tokens are those that add its text there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_TAIL_CHARS = 256
"""Of the first text are tokenised again: more than any word has, and a small part of a long text."""

_MAX_BREAK_CHARS = 64
"""The tail begins at a word, if one begins in so many characters."""

_TAIL_TOKENS = 64
"""Of a first text that was given as tokens."""

_CONTEXT_TOKENS = 8

_ANCHORS = ("\n", ".", "a", "0", ")")
"""Texts that a continuation is tried behind where its own first text merges with it."""


@dataclass(frozen=True, slots=True)
class Context:
    """What is continued.

    Attributes:
        token_ids: Its tokens, special tokens included.
        text: Its text; None where only the tokens were given.
    """

    token_ids: list[int]
    text: str | None = None


class ContinuationEncoder:
    """Tokenises continuations.

    Args:
        encode: Texts to token ids, without special tokens around them.
        decode: Token ids to text, special tokens shown.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], decode: Callable[[list[int]], str]) -> None:
        self._encode = encode
        self._decode = decode

    def encode(self, context: Context, continuations: Sequence[str]) -> list[list[int]]:
        """The tokens of each continuation behind a context."""
        found = self._together(self._tail(context), continuations)
        return [
            ids if ids is not None else self._by_text(context, text)
            for ids, text in zip(found, continuations, strict=True)
        ]

    def encode_labels(self, context: Context, labels: Sequence[str]) -> tuple[Context | str, list[list[int]]]:
        """The tokens of each label behind a context, which may lose the spaces at its end to the labels.

        Models have seen words with the space before them. So if a label merges with spaces that the text ends with,
        all labels are scored from before these, like in the harness.

        Returns:
            The context, or its text without those spaces, and the labels' tokens behind it.
        """
        found = self._together(self._tail(context), labels)
        if context.text is not None and any(ids is None for ids in found):
            shorter = context.text.rstrip()
            if shorter and shorter != context.text:
                spaces = context.text[len(shorter) :]
                moved = self._together(_tail_of(shorter), [spaces + label for label in labels])
                whole = [ids for ids in moved if ids is not None]
                if len(whole) == len(labels):
                    return shorter, whole
        return context, [
            ids if ids is not None else self._by_text(context, label)
            for ids, label in zip(found, labels, strict=True)
        ]

    def _tail(self, context: Context) -> str:
        if context.text is not None:
            return _tail_of(context.text)
        return self._decode(context.token_ids[-_TAIL_TOKENS:])

    def _together(self, before: str, continuations: Sequence[str]) -> list[list[int] | None]:
        """What each continuation adds to a text's tokens; None where it changes them."""
        own, *wholes = self._encode([before, *(before + text for text in continuations)])
        return [whole[len(own) :] if whole[: len(own)] == own else None for whole in wholes]

    def _by_text(self, context: Context, text: str) -> list[int]:
        """Tokens that add a text to a context, which has other tokens together with it."""
        last = context.token_ids[-_CONTEXT_TOKENS:]
        before = self._decode(last)

        def adds_text(ids: list[int]) -> bool:
            whole = self._decode(last + ids)
            return whole.startswith(before) and whole[len(before) :] == text

        (alone,) = self._encode([text])
        if adds_text(alone):
            return alone
        behind = [ids for anchor in _ANCHORS for ids in self._together(anchor, [text]) if ids]
        # A tokenizer may write no text as it was, in lower case for one; then none adds it.
        return next(filter(adds_text, behind), behind[0] if behind else alone)


def continuations_of(tokenizer: Any) -> ContinuationEncoder:
    """What tokenises continuations with a tokenizer of transformers."""

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
