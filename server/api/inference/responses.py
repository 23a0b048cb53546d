"""The JSON of generated text, in OpenAI's format. A stream writes one struct per token, so msgspec is used."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

ResponseId = Annotated[str, Meta(description="Identifier of the response.")]
ObjectType = Annotated[str, Meta(description="Type of the object.")]
Created = Annotated[int, Meta(description="Unix time in seconds.")]
ModelName = Annotated[str, Meta(description="The model that answered, as named in the request.")]
ChoiceIndex = Annotated[int, Meta(description="Index of the choice, from 0.")]
FinishReason = Annotated[
    str | None,
    Meta(
        description="`stop`, `length`, with tools `tool_calls`, or `error` for a member of `ensemble: each` that "
        "failed; null until the choice ends."
    ),
]
TokenIds = Annotated[list[int] | UnsetType, Meta(description="Ids of the new tokens, if requested.")]
PromptTokenIds = Annotated[list[int] | UnsetType, Meta(description="Token ids of the text, if requested.")]
TokenText = Annotated[str, Meta(description="Text of the token.")]
TokenBytes = Annotated[list[int], Meta(description="Bytes of the token, which may be a part of a character.")]
Logprob = Annotated[float, Meta(description="Natural logarithm of the probability.")]
Refusal = Annotated[None, Meta(description="Always null.")]
Step = Annotated[
    int | UnsetType,
    Meta(
        description="With `return_timings`: number of the engine's step that computed the newest token of the chunk."
    ),
]
MemberName = Annotated[str, Meta(description="`NAME@VERSION`, or the name of the base model.")]


class PromptTokensDetails(msgspec.Struct):
    """How the positions of the prompt were computed."""

    cached_tokens: Annotated[int, Meta(description="Text tokens found in the prefix cache.")]
    virtual_tokens: Annotated[int, Meta(description="Positions of soft prompts; not part of `prompt_tokens`.")]


class Usage(msgspec.Struct):
    """Token counts of a request, over all its choices."""

    prompt_tokens: Annotated[int, Meta(description="Text tokens, without virtual tokens.")]
    completion_tokens: Annotated[int, Meta(description="Generated tokens of all choices.")]
    total_tokens: Annotated[int, Meta(description="Sum of `prompt_tokens` and `completion_tokens`.")]
    prompt_tokens_details: Annotated[
        PromptTokensDetails, Meta(description="How the positions of the prompt were computed.")
    ]


class Timings(msgspec.Struct, kw_only=True):
    """Where the time of a choice went, and in which steps of the engine it took part."""

    queue_seconds: Annotated[float | None, Meta(description="From arrival at the engine to the first blocks.")]
    prefill_seconds: Annotated[float | None, Meta(description="From the first blocks to the first new token.")]
    first_token_seconds: Annotated[
        float | None, Meta(description="From the request's arrival to the first new token; null without one.")
    ]
    decode_seconds: Annotated[float, Meta(description="From the first new token to the last.")]
    first_step: Annotated[
        int | None, Meta(description="The engine's step that computed the first new token; null if not numbered.")
    ]
    last_step: Annotated[
        int | None, Meta(description="The engine's step that computed the last new token; null if not numbered.")
    ]


class ChoiceError(msgspec.Struct, kw_only=True):
    """Why a choice ended with `error`."""

    code: Annotated[str, Meta(description="Stable error code.")]
    message: Annotated[str, Meta(description="Message in plain text.")]


ChoiceModel = Annotated[
    str | UnsetType,
    Meta(description="With `ensemble: each`: `NAME@VERSION` of the member, or the base model's name."),
]
ChoiceFault = Annotated[
    ChoiceError | UnsetType,
    Meta(description="With `ensemble: each`: why the member failed after the stream had begun."),
]
ChoiceTimings = Annotated[
    Timings | UnsetType, Meta(description="With `return_timings`, in the last part of a choice: its times and steps.")
]


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of the tokens of a text: OpenAI's arrays, one entry per token."""

    tokens: Annotated[
        list[str], Meta(description="Text of each token; `bytes:\\xe2` and the like for a part of a character.")
    ]
    token_logprobs: Annotated[
        list[float | None],
        Meta(description="Log-probability of each token; null only for a first token with nothing before it."),
    ]
    top_logprobs: Annotated[
        list[dict[str, float] | None] | None,
        Meta(description="The most likely tokens and the actual one per position; null if not requested."),
    ]
    text_offset: Annotated[
        list[int], Meta(description="Offset of each token in the text of the choice, in characters.")
    ]


class TopLogprob(msgspec.Struct):
    """One of the most likely tokens."""

    token: TokenText
    logprob: Logprob
    bytes: TokenBytes


class ChatTokenLogprob(msgspec.Struct):
    """A token of the answer, and the most likely tokens at its position."""

    token: TokenText
    logprob: Logprob
    bytes: TokenBytes
    top_logprobs: Annotated[list[TopLogprob], Meta(description="The most likely tokens at this position.")]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of the tokens of an answer."""

    content: Annotated[list[ChatTokenLogprob], Meta(description="One entry per token.")]
    refusal: Refusal = None


class MemberText(msgspec.Struct, kw_only=True):
    """The text of one member of an ensemble."""

    model: MemberName
    text: Annotated[str, Meta(description="The whole text.")]
    logprob: Annotated[float, Meta(description="Mean log-probability of its tokens.")]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One generated text, or a part of it in a stream."""

    index: ChoiceIndex
    text: Annotated[str, Meta(description="The text, or its next part in a stream.")]
    logprobs: Annotated[CompletionLogprobs | None, Meta(description="Log-probabilities of the tokens.")] = None
    finish_reason: FinishReason = None
    token_ids: TokenIds = UNSET
    prompt_token_ids: PromptTokenIds = UNSET
    model: ChoiceModel = UNSET
    error: ChoiceFault = UNSET
    timings: ChoiceTimings = UNSET
    votes: Annotated[
        dict[str, int] | UnsetType, Meta(description="Of a voting ensemble: number of members per text.")
    ] = UNSET
    members: Annotated[
        list[MemberText] | UnsetType, Meta(description="Of a voting ensemble: the text of each member.")
    ] = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The response of ``/v1/completions``, and each chunk of its stream."""

    id: ResponseId
    object: ObjectType = "text_completion"
    created: Created
    model: ModelName
    choices: Annotated[list[CompletionChoice], Meta(description="The texts, or their next parts in a stream.")]
    usage: Annotated[Usage | UnsetType | None, Meta(description="Token counts of the request.")] = UNSET
    step: Step = UNSET


class CalledFunction(msgspec.Struct):
    """A function's name and its arguments as a JSON string."""

    name: Annotated[str, Meta(description="Name of the function.")]
    arguments: Annotated[str, Meta(description="Arguments of the call: a JSON object in a string.")]


class AnsweredCall(msgspec.Struct, kw_only=True):
    """A tool call of the assistant."""

    id: Annotated[str, Meta(description="Identifier of the call.")]
    type: Annotated[str, Meta(description="Always `function`.")] = "function"
    function: Annotated[CalledFunction, Meta(description="The called function.")]


class ChatAnswer(msgspec.Struct, kw_only=True):
    """The assistant's message; its content is null if it consists of tool calls only."""

    role: Annotated[str, Meta(description="Always `assistant`.")] = "assistant"
    content: Annotated[str | None, Meta(description="Text of the message; null if there are only tool calls.")]
    refusal: Refusal = None
    tool_calls: Annotated[list[AnsweredCall] | UnsetType, Meta(description="Functions that the model calls.")] = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One choice of a chat completion."""

    index: ChoiceIndex
    message: Annotated[ChatAnswer, Meta(description="The message of the assistant.")]
    logprobs: Annotated[ChatLogprobs | None, Meta(description="Log-probabilities of the tokens.")] = None
    finish_reason: FinishReason = None
    token_ids: TokenIds = UNSET
    prompt_token_ids: PromptTokenIds = UNSET
    model: ChoiceModel = UNSET
    timings: ChoiceTimings = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The response of ``/v1/chat/completions``."""

    id: ResponseId
    object: ObjectType = "chat.completion"
    created: Created
    model: ModelName
    choices: Annotated[list[ChatChoice], Meta(description="The generated messages.")]
    usage: Annotated[Usage, Meta(description="Token counts of the request.")]


class FunctionDelta(msgspec.Struct, kw_only=True):
    """The name (in a call's first part) and a part of the arguments."""

    name: Annotated[str | UnsetType, Meta(description="Name of the function, in the first part of a call.")] = UNSET
    arguments: Annotated[str, Meta(description="The next part of the arguments.")]


class CallDelta(msgspec.Struct, kw_only=True):
    """The part of a tool call in one chunk."""

    index: Annotated[int, Meta(description="Index of the call, from 0.")]
    id: Annotated[str | UnsetType, Meta(description="Identifier of the call, in its first part.")] = UNSET
    type: Annotated[str | UnsetType, Meta(description="`function`, in the first part of a call.")] = UNSET
    function: Annotated[FunctionDelta, Meta(description="The next part of the called function.")]


class ChatDelta(msgspec.Struct, kw_only=True):
    """The part of the assistant's message in one chunk."""

    role: Annotated[str | UnsetType, Meta(description="`assistant`, in the first part of a message.")] = UNSET
    content: Annotated[str | UnsetType, Meta(description="The next part of the text.")] = UNSET
    tool_calls: Annotated[list[CallDelta] | UnsetType, Meta(description="The next parts of tool calls.")] = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """The part of one choice in a chunk."""

    index: ChoiceIndex
    delta: Annotated[ChatDelta, Meta(description="The next part of the message.")]
    logprobs: Annotated[ChatLogprobs | None, Meta(description="Log-probabilities of the tokens of this part.")] = None
    finish_reason: FinishReason = None
    token_ids: TokenIds = UNSET
    prompt_token_ids: PromptTokenIds = UNSET
    model: ChoiceModel = UNSET
    error: ChoiceFault = UNSET
    timings: ChoiceTimings = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream."""

    id: ResponseId
    object: ObjectType = "chat.completion.chunk"
    created: Created
    model: ModelName
    choices: Annotated[list[ChatChunkChoice], Meta(description="The next parts of the messages.")]
    usage: Annotated[
        Usage | UnsetType | None, Meta(description="Token counts so far, or of the whole request in the last chunk.")
    ] = UNSET
    step: Step = UNSET
