"""The JSON of generated text: one writer for each endpoint, for the full response and for the stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from server.api.generation.generation import Delta
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
    Timings,
    Usage,
)

T = TypeVar("T")


class Choices(Protocol):
    """The choices of a request, while they are generated."""

    @property
    def num_choices(self) -> int:
        """Number of texts."""
        ...

    def prompt_of(self, index: int) -> list[int]:
        """The text tokens that a choice continues."""
        ...

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices as they arrive; closing it early aborts all running sequences."""
        ...


@dataclass(slots=True)
class ChoiceText:
    """One choice, collected from its deltas.

    Attributes:
        prompt_token_ids: The text tokens that it continues.
        pieces: Its text, in parts.
        token_ids: Its new tokens.
        finish_reason: Why it ended.
        scored: Its tokens with logprobs; None if the request has no logprobs.
        model: The member that generated it, if each member has choices of its own.
        timings: Its times, if requested.
    """

    prompt_token_ids: list[int]
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    scored: list[ScoredToken] | None = None
    model: str | None = None
    timings: Timings | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        self.model, self.timings = delta.model, delta.timings
        if delta.scored is not None:
            if self.scored is None:
                self.scored = []
            self.scored += delta.scored


async def collect(generation: Choices) -> list[ChoiceText]:
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
        with_steps: Whether chunks include the engine's step, and so each token has one.
        num_top: Number of most likely tokens in the logprobs; None for no logprobs.
        token_bytes: Returns the bytes of a token, for logprobs.
    """

    id_prefix: str

    def __init__(
        self,
        model: str,
        *,
        with_token_ids: bool,
        with_steps: bool,
        num_top: int | None,
        token_bytes: TokenBytes,
    ) -> None:
        self._with_steps = with_steps
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
        return bool(delta.text) or self._shows_tokens(delta)

    def _shows_tokens(self, delta: Delta) -> bool:
        """Whether a delta without text has something to say about its tokens."""
        return bool(delta.scored) or ((self._with_token_ids or self._with_steps) and bool(delta.token_ids))

    def _step(self, delta: Delta) -> int | UnsetType:
        return delta.step if self._with_steps and delta.step is not None else UNSET


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
                    model=_known(choice.model),
                    timings=_known(choice.timings),
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
            model=_known(delta.model),
            error=_known(delta.error),
            timings=_known(delta.timings),
        )
        yield self._completion([choice], usage, self._step(delta))

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The stream's last chunk, without choices."""
        return self._completion([], usage)

    def _logprobs(self, scored: list[ScoredToken] | None) -> CompletionLogprobs | None:
        if scored is None:
            return None
        return completion_logprobs(scored, self._token_bytes, with_top=bool(self._num_top))

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None, step: int | UnsetType = UNSET
    ) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, step=step
        )


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
        with_steps: bool,
        num_top: int | None,
        token_bytes: TokenBytes,
        make_reader: MakeReader | None,
    ) -> None:
        super().__init__(
            model, with_token_ids=with_token_ids, with_steps=with_steps, num_top=num_top, token_bytes=token_bytes
        )
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
                    model=_known(choice.model),
                    timings=_known(choice.timings),
                )
            )
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=answered, usage=usage)

    def chunks(
        self, delta: Delta, prompt_token_ids: list[int], usage: Usage | UnsetType | None
    ) -> Iterator[msgspec.Struct]:
        """The role once, then text and calls, then the finish reason with an empty delta."""
        step, model = self._step(delta), _known(delta.model)
        if self._is_first(delta):
            first = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(role="assistant", content=""),
                prompt_token_ids=self._ids(prompt_token_ids),
                model=model,
            )
            yield self._chunk([first], usage, step)
        pieces, reason = self._read(delta.index, delta.text, delta.finish_reason)
        parts = [_chat_delta(piece) for piece in pieces]
        if not parts and self._shows_tokens(delta):  # the text may belong to a call that is not complete
            parts = [ChatDelta(content="")]
        for position, part in enumerate(parts):
            own = ChatChunkChoice(index=delta.index, delta=part, model=model)
            if position == 0:
                own.logprobs, own.token_ids = self._logprobs(delta.scored), self._ids(delta.token_ids)
            yield self._chunk([own], usage, step)
        if reason is not None:
            last = ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(),
                finish_reason=reason if delta.error is None else delta.finish_reason,
                model=model,
                error=_known(delta.error),
                timings=_known(delta.timings),
            )
            yield self._chunk([last], usage, step)

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

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None, step: int | UnsetType = UNSET
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, step=step
        )


def _known(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


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
