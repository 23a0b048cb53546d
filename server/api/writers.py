"""How generated text is laid out: one writer for each endpoint, for its single answer and for its stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from server.api.generation import Delta
from server.api.logprobs import ScoredToken, TokenBytes, chat_logprobs, completion_logprobs
from server.api.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)


@dataclass(slots=True)
class ChoiceText:
    """One choice, gathered from its deltas.

    Attributes:
        prompt_token_ids: The text tokens that it continues.
        pieces: Its text.
        token_ids: Its new tokens.
        finish_reason: Why it ended.
        scored: How likely its tokens were, or None where it was not asked for.
    """

    prompt_token_ids: list[int]
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    scored: list[ScoredToken] | None = None

    def add(self, delta: Delta) -> None:
        """Append what the choice gained."""
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        if delta.scored is not None:
            if self.scored is None:
                self.scored = []
            self.scored += delta.scored


class Writer(ABC):
    """Lays out one request's choices.

    Args:
        model: The model as the client named it.
        with_token_ids: Whether choices hold their token ids and those of their prompts.
        num_top: Likeliest tokens in the logprobs; None where there are no logprobs.
        token_bytes: The tokenizer's, for logprobs.
    """

    id_prefix: str

    def __init__(self, model: str, *, with_token_ids: bool, num_top: int | None, token_bytes: TokenBytes) -> None:
        self._model = model
        self._num_top = num_top
        self._token_bytes = token_bytes
        self._with_token_ids = with_token_ids
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._started: set[int] = set()

    @abstractmethod
    def answer(self, choices: list[ChoiceText], usage: Usage) -> msgspec.Struct:
        """The whole answer."""

    @abstractmethod
    def chunks(
        self, delta: Delta, prompt_token_ids: list[int], usage: Usage | UnsetType | None
    ) -> Iterator[msgspec.Struct]:
        """The stream's chunks for a delta; none where it shows nothing yet."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The stream's last chunk, without choices."""

    def _ids(self, token_ids: list[int]) -> list[int] | UnsetType:
        return token_ids if self._with_token_ids else UNSET

    def _is_first(self, delta: Delta) -> bool:
        is_first = delta.index not in self._started
        self._started.add(delta.index)
        return is_first

    def _has_content(self, delta: Delta) -> bool:
        return bool(delta.text) or bool(delta.scored) or (self._with_token_ids and bool(delta.token_ids))


class CompletionWriter(Writer):
    """``/v1/completions``."""

    id_prefix = "cmpl"

    def answer(self, choices: list[ChoiceText], usage: Usage) -> msgspec.Struct:
        """The whole answer."""
        return self._completion(
            [
                CompletionChoice(
                    index=index,
                    text="".join(choice.pieces),
                    logprobs=self._logprobs(choice.scored),
                    finish_reason=choice.finish_reason,
                    token_ids=self._ids(choice.token_ids),
                    prompt_token_ids=self._ids(choice.prompt_token_ids),
                )
                for index, choice in enumerate(choices)
            ],
            usage,
        )

    def chunks(
        self, delta: Delta, prompt_token_ids: list[int], usage: Usage | UnsetType | None
    ) -> Iterator[msgspec.Struct]:
        """One chunk with the text, and the finish reason where there is one."""
        if not self._has_content(delta) and delta.finish_reason is None:
            return
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.scored),
            finish_reason=delta.finish_reason,
            token_ids=self._ids(delta.token_ids),
            prompt_token_ids=self._ids(prompt_token_ids) if self._is_first(delta) else UNSET,
        )
        yield self._completion([choice], usage)

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The stream's last chunk, without choices."""
        return self._completion([], usage)

    def _logprobs(self, scored: list[ScoredToken] | None) -> CompletionLogprobs | None:
        if scored is None:
            return None
        return completion_logprobs(scored, self._token_bytes, with_top=bool(self._num_top))

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


class ChatWriter(Writer):
    """``/v1/chat/completions``."""

    id_prefix = "chatcmpl"

    def answer(self, choices: list[ChoiceText], usage: Usage) -> msgspec.Struct:
        """The whole answer."""
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatAnswer(content="".join(choice.pieces)),
                    logprobs=self._logprobs(choice.scored),
                    finish_reason=choice.finish_reason,
                    token_ids=self._ids(choice.token_ids),
                    prompt_token_ids=self._ids(choice.prompt_token_ids),
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )

    def chunks(
        self, delta: Delta, prompt_token_ids: list[int], usage: Usage | UnsetType | None
    ) -> Iterator[msgspec.Struct]:
        """The role once, then the text, then the finish reason with an empty delta."""
        if self._is_first(delta):
            first = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(role="assistant", content=""),
                prompt_token_ids=self._ids(prompt_token_ids),
            )
            yield self._chunk([first], usage)
        if self._has_content(delta):
            piece = ChatDelta(content=delta.text)
            own = ChatChunkChoice(
                index=delta.index,
                delta=piece,
                logprobs=self._logprobs(delta.scored),
                token_ids=self._ids(delta.token_ids),
            )
            yield self._chunk([own], usage)
        if delta.finish_reason is not None:
            last = ChatChunkChoice(index=delta.index, delta=ChatDelta(), finish_reason=delta.finish_reason)
            yield self._chunk([last], usage)

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The stream's last chunk, without choices."""
        return self._chunk([], usage)

    def _logprobs(self, scored: list[ScoredToken] | None) -> ChatLogprobs | None:
        return None if scored is None else chat_logprobs(scored, self._token_bytes)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
