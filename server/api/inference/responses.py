"""The JSON of generated text, in OpenAI's shape: msgspec structs, because a stream writes one for each token."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """Where the prompt's positions came from.

    Attributes:
        cached_tokens: Text tokens whose keys and values a cached prefix saved.
        virtual_tokens: Positions that soft prompts took; not part of ``prompt_tokens``.
    """

    cached_tokens: int
    virtual_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct):
    r"""How likely each token of a text was: OpenAI's arrays, one entry a token.

    Attributes:
        tokens: What each token shows by itself; ``bytes:\xe2`` and the like for a part of a character.
        token_logprobs: None only for the first token of a text that nothing stands before.
        top_logprobs: The likeliest tokens and the one that stands here; None where none were asked for.
        text_offset: Characters of the choice's text before each token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TopLogprob(msgspec.Struct):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """A token of the answer, and those that were likely there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """How likely each token of an answer was."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class MemberText(msgspec.Struct, kw_only=True):
    """What one soft prompt of an ensemble wrote.

    Attributes:
        model: ``NAME@VERSION``, or the base's name.
        text: All of it.
        logprob: Mean log-probability of its tokens.
    """

    model: str
    text: str
    logprob: float


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One text, or a piece of it in a stream.

    Attributes:
        votes: Of an ensemble: how many members wrote each text.
        members: Of an ensemble: what each of them wrote.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    votes: dict[str, int] | UnsetType = UNSET
    members: list[MemberText] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/completions``, and each chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class CalledFunction(msgspec.Struct):
    """A function's name and arguments, which are JSON in a string."""

    name: str
    arguments: str


class AnsweredCall(msgspec.Struct, kw_only=True):
    """A call that the assistant makes."""

    id: str
    type: str = "function"
    function: CalledFunction


class ChatAnswer(msgspec.Struct, kw_only=True):
    """The assistant's message; its content is null where it is nothing but calls."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct, kw_only=True):
    """The name in a call's first piece, arguments in all."""

    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(msgspec.Struct, kw_only=True):
    """What a chunk adds to one call."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True):
    """What a chunk adds to the assistant's message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
