"""Logprobs as OpenAI lays them out: arrays for completions, objects for chat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.api.inference.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from server.engine.detokenizer import Decode, TextWindow, common_length
from server.engine.types import Logprobs


class TokenBytes(Protocol):
    """What one token adds to a text; it may be a part of a character."""

    def __call__(self, token_id: int, *, begins_text: bool = False) -> bytes:
        """The bytes behind other text, or those that it begins a text with."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a choice, and how likely it was.

    Attributes:
        token_id: Which token.
        offset: Characters of the choice's text before it.
        logprobs: None only for the first token of a text that nothing stands before.
        begins_text: Whether no token before it shows anything, neither of the prompt nor of the answer. Many
            tokenizers leave out the space of such a token.
    """

    token_id: int
    offset: int
    logprobs: Logprobs | None
    begins_text: bool = False


class TokenScorer:
    """Finds where each token of a text begins.

    Tokens of one character all begin where it does. A character that the prompt begins and the answer completes is
    the answer's.

    Args:
        decode: Token ids to text; called with windows of a few tokens.
        token_bytes: The tokenizer's.
        prompt_ids: The tokens before the first; empty where the text is shown with its prompt, whose tokens come
            first then.
    """

    def __init__(self, decode: Decode, token_bytes: TokenBytes, prompt_ids: Sequence[int] = ()) -> None:
        self._window = TextWindow(decode, prompt_ids)
        self._token_bytes = token_bytes
        self._partial = b""
        """The first bytes of a character whose other bytes are still to come."""
        self._partial_offset = 0
        for token_id in prompt_ids[-_MAX_PARTIAL_TOKENS:]:
            if not self._window.is_void(token_id):
                self._partial = _unfinished(self._partial + token_bytes(token_id))

    def append(self, token_ids: Sequence[int], logprobs: Sequence[Logprobs | None]) -> list[ScoredToken]:
        """Take the text's next tokens."""
        return [self._score(token_id, own) for token_id, own in zip(token_ids, logprobs, strict=True)]

    def _score(self, token_id: int, logprobs: Logprobs | None) -> ScoredToken:
        window = self._window
        begins_text = window.is_empty
        before, pending = window.num_chars, window.pending
        final = window.append(token_id)
        if not final and window.pending == pending and window.is_void(token_id):
            offset = self._partial_offset if self._partial else before + len(pending)
            return ScoredToken(token_id, offset, logprobs, begins_text)
        shown = self._token_bytes(token_id, begins_text=begins_text)
        if self._partial and _continues(self._partial, shown):
            offset = self._partial_offset
        else:
            # Bytes that turned out to be no character stay behind as replacement characters.
            offset = before + common_length(pending, final + window.pending)
        unfinished = _unfinished(self._partial + shown)
        if unfinished and len(unfinished) <= len(shown):  # else its first byte came before
            is_all = len(unfinished) == len(shown)
            self._partial_offset = offset if is_all else window.num_chars + len(window.pending) - 1
        self._partial = unfinished
        return ScoredToken(token_id, offset, logprobs, begins_text)


_MAX_PARTIAL_TOKENS = 3


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a character and do not complete it."""
    for length in range(min(3, len(data)), 0, -1):
        if _begins_character(data[-length:]):
            return data[-length:]
    return b""


def _continues(partial: bytes, more: bytes) -> bool:
    """Whether the next byte goes on with the character that was begun."""
    if not more:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(partial + more[:1])
    except UnicodeDecodeError:
        return False
    return True


def _begins_character(data: bytes) -> bool:
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False


def completion_logprobs(
    scored: Sequence[ScoredToken], token_bytes: TokenBytes, *, with_top: bool
) -> CompletionLogprobs:
    """The arrays of ``/v1/completions``.

    Args:
        scored: The tokens of a choice, or of a chunk of it.
        token_bytes: The tokenizer's.
        with_top: Whether the likeliest tokens were asked for.
    """
    tokens = [shown_token(token_bytes(item.token_id, begins_text=item.begins_text)) for item in scored]
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
            shown = token_bytes(item.token_id, begins_text=item.begins_text)
            likeliest = (
                (token_bytes(token_id, begins_text=item.begins_text), logprob)
                for token_id, logprob in item.logprobs.top
            )
            top = [TopLogprob(shown_token(other), logprob, list(other)) for other, logprob in likeliest]
            content.append(ChatTokenLogprob(shown_token(shown), item.logprobs.logprob, list(shown), top))
    return ChatLogprobs(content)


def _top_by_text(item: ScoredToken, text: str, token_bytes: TokenBytes) -> dict[str, float] | None:
    if item.logprobs is None:
        return None
    top: dict[str, float] = {}
    # Different tokens may show the same; the likeliest stands for them, so the greatest value is the argmax's.
    for token_id, logprob in item.logprobs.top:
        top.setdefault(shown_token(token_bytes(token_id, begins_text=item.begins_text)), logprob)
    top.setdefault(text, item.logprobs.logprob)  # as OpenAI does, though it may be one more than was asked for
    return top


def shown_token(token: bytes) -> str:
    """A token's text, or its bytes where they are a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
