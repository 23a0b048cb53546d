"""The JSON of generated text: one writer for each endpoint, for the full response and for the stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from server.api.generation.generation import Delta, Generation
from server.api.generation.tool_calls import CallArguments, CallStart, MakeReader, Piece, Text, ToolCallReader
from server.api.inference.logprobs import ScoredToken, TokenBytes, chat_logprobs, completion_logprobs
from server.api.inference.responses import (
    AnsweredCall,
    CallDelta,
    CalledFunction,
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
    FunctionDelta,
    Usage,
)


@dataclass(slots=True)
class ChoiceText:
    """One choice, collected from its deltas.

    Attributes:
        prompt_token_ids: The text tokens that it continues.
        pieces: Its text, in parts.
        token_ids: Its new tokens.
        finish_reason: Why it ended.
        scored: Its tokens with logprobs; None if the request has no logprobs.
    """

    prompt_token_ids: list[int]
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    scored: list[ScoredToken] | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        if delta.scored is not None:
            if self.scored is None:
                self.scored = []
            self.scored += delta.scored


async def collect(generation: Generation) -> list[ChoiceText]:
    """Run a generation to its end, and return its choices."""
    choices = [ChoiceText(generation.prompt_of(index)) for index in range(generation.num_choices)]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choices[delta.index].add(delta)
    return choices


class Writer(ABC):
    """Builds the JSON structs of one request's choices.

    Args:
        model: The model's name in the request.
        with_token_ids: Whether choices include their token ids and those of their prompts.
        num_top: Number of most likely tokens in the logprobs; None for no logprobs.
        token_bytes: Returns the bytes of a token, for logprobs.
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
        """The full response."""

    @abstractmethod
    def chunks(
        self, delta: Delta, prompt_token_ids: list[int], usage: Usage | UnsetType | None
    ) -> Iterator[msgspec.Struct]:
        """The stream's chunks for a delta; none if it shows nothing yet."""

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

    def answer(self, choices: list[ChoiceText], usage: Usage) -> Completion:
        """The full response."""
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
        """One chunk with the text, and the finish reason if there is one."""
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
    """``/v1/chat/completions``.

    Args:
        make_reader: Makes a parser of the tool calls in a choice's text; None if there can be none.
    """

    id_prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        *,
        with_token_ids: bool,
        num_top: int | None,
        token_bytes: TokenBytes,
        make_reader: MakeReader | None,
    ) -> None:
        super().__init__(model, with_token_ids=with_token_ids, num_top=num_top, token_bytes=token_bytes)
        self._make_reader = make_reader
        self._readers: dict[int, ToolCallReader] = {}

    def answer(self, choices: list[ChoiceText], usage: Usage) -> msgspec.Struct:
        """The full response."""
        answered = []
        for index, choice in enumerate(choices):
            pieces, reason = self._read(index, "".join(choice.pieces), choice.finish_reason)
            answered.append(
                ChatChoice(
                    index=index,
                    message=_message(pieces),
                    logprobs=self._logprobs(choice.scored),
                    finish_reason=reason,
                    token_ids=self._ids(choice.token_ids),
                    prompt_token_ids=self._ids(choice.prompt_token_ids),
                )
            )
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=answered, usage=usage)

    def chunks(
        self, delta: Delta, prompt_token_ids: list[int], usage: Usage | UnsetType | None
    ) -> Iterator[msgspec.Struct]:
        """The role once, then text and calls, then the finish reason with an empty delta."""
        if self._is_first(delta):
            first = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(role="assistant", content=""),
                prompt_token_ids=self._ids(prompt_token_ids),
            )
            yield self._chunk([first], usage)
        pieces, reason = self._read(delta.index, delta.text, delta.finish_reason)
        parts = [_chat_delta(piece) for piece in pieces]
        if not parts and (delta.scored or (self._with_token_ids and delta.token_ids)):
            parts = [ChatDelta(content="")]
        for position, part in enumerate(parts):
            own = ChatChunkChoice(index=delta.index, delta=part)
            if position == 0:
                own.logprobs, own.token_ids = self._logprobs(delta.scored), self._ids(delta.token_ids)
            yield self._chunk([own], usage)
        if reason is not None:
            last = ChatChunkChoice(index=delta.index, delta=ChatDelta(), finish_reason=reason)
            yield self._chunk([last], usage)

    def _read(self, index: int, text: str, reason: str | None) -> tuple[list[Piece], str | None]:
        """Parse a choice's new text into pieces; the finish reason may change to ``tool_calls``."""
        if self._make_reader is None:
            return [Text(text)] if text else [], reason
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._make_reader()
        pieces = reader.append(text)
        if reason is not None:
            last, reason = reader.finish(reason)
            pieces = pieces + last
        return pieces, reason

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The stream's last chunk, without choices."""
        return self._chunk([], usage)

    def _logprobs(self, scored: list[ScoredToken] | None) -> ChatLogprobs | None:
        return None if scored is None else chat_logprobs(scored, self._token_bytes)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


def _message(pieces: list[Piece]) -> ChatAnswer:
    text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    calls = {
        piece.index: AnsweredCall(id=piece.id, function=CalledFunction(piece.name, ""))
        for piece in pieces
        if isinstance(piece, CallStart)
    }
    for piece in pieces:
        if isinstance(piece, CallArguments):
            calls[piece.index].function.arguments += piece.text
    if not calls:
        return ChatAnswer(content=text)
    return ChatAnswer(content=text or None, tool_calls=list(calls.values()))


def _chat_delta(piece: Piece) -> ChatDelta:
    match piece:
        case Text(text):
            return ChatDelta(content=text)
        case CallStart(index, call_id, name):
            function = FunctionDelta(name=name, arguments="")
            return ChatDelta(tool_calls=[CallDelta(index=index, id=call_id, type="function", function=function)])
        case CallArguments(index, text):
            return ChatDelta(tool_calls=[CallDelta(index=index, function=FunctionDelta(arguments=text))])
