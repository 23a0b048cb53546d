"""Logprobs as OpenAI lays them out: arrays for completions, objects for chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.api.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from server.engine.detokenizer import IncrementalDetokenizer
from server.engine.types import Logprobs

TokenBytes = Callable[[int], bytes]
"""What one token shows by itself; it may be a part of a character."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a choice, and how likely it was.

    Attributes:
        token_id: Which token.
        offset: Characters of the choice's text before it.
        logprobs: None only for the first token of a text that nothing stands before.
    """

    token_id: int
    offset: int
    logprobs: Logprobs | None


class TokenScorer:
    """Finds where each token of a text begins.

    Args:
        decode: Token ids to text; called with windows of a few tokens.
        base: Characters of the choice's text before the first token.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, base: int = 0) -> None:
        self._detokenizer = IncrementalDetokenizer(decode)
        self._base = base

    def append(self, token_ids: Sequence[int], logprobs: Sequence[Logprobs | None]) -> list[ScoredToken]:
        """Take the text's next tokens; those of one character all begin where it does."""
        scored = []
        for token_id, own in zip(token_ids, logprobs, strict=True):
            scored.append(ScoredToken(token_id, self._base + len(self._detokenizer.text), own))
            self._detokenizer.append([token_id])
        return scored


def completion_logprobs(
    scored: Sequence[ScoredToken], token_bytes: TokenBytes, *, with_top: bool
) -> CompletionLogprobs:
    """The arrays of ``/v1/completions``.

    Args:
        scored: The tokens of a choice, or of a chunk of it.
        token_bytes: The tokenizer's.
        with_top: Whether the likeliest tokens were asked for.
    """
    tokens = [_shown(token_bytes(item.token_id)) for item in scored]
    top = None
    if with_top:
        top = [_top_by_text(item, text, token_bytes) for item, text in zip(scored, tokens, strict=True)]
    logprobs = [None if item.logprobs is None else item.logprobs.logprob for item in scored]
    return CompletionLogprobs(tokens, logprobs, top, [item.offset for item in scored])


def chat_logprobs(scored: Sequence[ScoredToken], token_bytes: TokenBytes) -> ChatLogprobs:
    """The objects of ``/v1/chat/completions``."""
    content = []
    for item in scored:
        if item.logprobs is not None:
            shown = token_bytes(item.token_id)
            top = [
                TopLogprob(_shown(other), logprob, list(other))
                for other, logprob in ((token_bytes(token_id), logprob) for token_id, logprob in item.logprobs.top)
            ]
            content.append(ChatTokenLogprob(_shown(shown), item.logprobs.logprob, list(shown), top))
    return ChatLogprobs(content)


def _top_by_text(item: ScoredToken, text: str, token_bytes: TokenBytes) -> dict[str, float] | None:
    if item.logprobs is None:
        return None
    top: dict[str, float] = {}
    # Different tokens may show the same; the likeliest stands for them, so the greatest value is the argmax's.
    for token_id, logprob in item.logprobs.top:
        top.setdefault(_shown(token_bytes(token_id)), logprob)
    top.setdefault(text, item.logprobs.logprob)  # as OpenAI does, though it may be one more than was asked for
    return top


def _shown(token: bytes) -> str:
    """A token's text, or its bytes where they are a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
