"""The JSON of generated text, in OpenAI's shape: msgspec structs, because a stream writes one for each token."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """How the positions of the prompt were computed.

    Attributes:
        cached_tokens: Text tokens found in the prefix cache.
        virtual_tokens: Positions that soft prompts took; not part of ``prompt_tokens``.
    """

    cached_tokens: int
    virtual_tokens: int


class Usage(msgspec.Struct):
    """Token counts of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct):
    r"""Log-probabilities of the tokens of a text: OpenAI's arrays, one entry per token.

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
    """One of the most likely tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """A token of the answer, and the most likely tokens at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of the tokens of an answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class MemberText(msgspec.Struct, kw_only=True):
    """The text of one soft prompt of an ensemble.

    Attributes:
        model: ``NAME@VERSION``, or the base's name.
        text: All of it.
        logprob: Mean log-probability of its tokens.
    """

    model: str
    text: str
    logprob: float


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One generated text, or a part of it in a stream.

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
    """The response of ``/v1/completions``, and each chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class CalledFunction(msgspec.Struct):
    """A function's name and its arguments as a JSON string."""

    name: str
    arguments: str


class AnsweredCall(msgspec.Struct, kw_only=True):
    """A tool call of the assistant."""

    id: str
    type: str = "function"
    function: CalledFunction


class ChatAnswer(msgspec.Struct, kw_only=True):
    """The assistant's message; its content is null if it consists of tool calls only."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One choice of a chat completion."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The response of ``/v1/chat/completions``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct, kw_only=True):
    """The name (in a call's first part) and a part of the arguments."""

    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(msgspec.Struct, kw_only=True):
    """The part of a tool call in one chunk."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True):
    """The part of the assistant's message in one chunk."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """The part of one choice in a chunk."""

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
