"""Logprobs in OpenAI's formats: arrays for completions, objects for chat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.api.inference.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from server.engine.detokenizer import Decode, TextWindow, common_length
from server.engine.types import Logprobs


class TokenBytes(Protocol):
    """Returns the bytes that one token adds to a text; they may be part of a character."""

    def __call__(self, token_id: int, *, begins_text: bool = False) -> bytes:
        """The token's bytes after other text, or at the beginning of a text."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a choice with its logprobs.

    Attributes:
        token_id: The token.
        offset: Characters of the choice's text before it.
        logprobs: None only for the first token of a text without a soft prompt.
        begins_text: Whether all tokens before it, of the prompt and of the answer, show no text. Many tokenizers omit
            the space of such a token.
    """

    token_id: int
    offset: int
    logprobs: Logprobs | None
    begins_text: bool = False


class TokenScorer:
    """Finds the offset of each token in its text.

    All tokens of one character have the character's offset. A character that begins in the prompt and ends in the
    answer belongs to the answer.

    Args:
        decode: Token ids to text; called with windows of a few tokens.
        token_bytes: Returns the bytes of a token.
        prompt_ids: The tokens before the first; empty if the text begins with its prompt.
    """

    def __init__(self, decode: Decode, token_bytes: TokenBytes, prompt_ids: Sequence[int] = ()) -> None:
        self._window = TextWindow(decode, prompt_ids)
        self._token_bytes = token_bytes
        self._partial = b""
        """The first bytes of a character that is not complete yet."""
        self._partial_offset = 0
        for token_id in prompt_ids[-_MAX_PARTIAL_TOKENS:]:
            if not self._window.is_void(token_id):
                self._partial = _unfinished(self._partial + token_bytes(token_id))

    def append(self, token_ids: Sequence[int], logprobs: Sequence[Logprobs | None]) -> list[ScoredToken]:
        """Add the next tokens of the text."""
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
            # Bytes that do not form a character remain as replacement characters.
            offset = before + common_length(pending, final + window.pending)
        unfinished = _unfinished(self._partial + shown)
        if unfinished and len(unfinished) <= len(shown):  # else its first byte came before
            is_all = len(unfinished) == len(shown)
            self._partial_offset = offset if is_all else window.num_chars + len(window.pending) - 1
        self._partial = unfinished
        return ScoredToken(token_id, offset, logprobs, begins_text)


_MAX_PARTIAL_TOKENS = 3


def _unfinished(data: bytes) -> bytes:
    """The bytes of an incomplete character at the end."""
    for length in range(min(3, len(data)), 0, -1):
        if _begins_character(data[-length:]):
            return data[-length:]
    return b""


def _continues(partial: bytes, more: bytes) -> bool:
    """Whether the next byte continues an incomplete character."""
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
        token_bytes: Returns the bytes of a token.
        with_top: Whether the request asks for the most likely tokens.
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
    # Several tokens may have the same text; keep the most likely one, so that the maximum is the argmax.
    for token_id, logprob in item.logprobs.top:
        top.setdefault(shown_token(token_bytes(token_id, begins_text=item.begins_text)), logprob)
    top.setdefault(text, item.logprobs.logprob)  # as OpenAI does, even if it is one more than requested
    return top


def shown_token(token: bytes) -> str:
    """A token's text, or its bytes if they are part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
