"""The request bodies of the generation routes, with their validation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, PrivateAttr, model_validator

from server.api.generation.known_fields import CHAT, COMPLETIONS, EVERYWHERE, KnownFieldsBody, Refused
from server.api.generation.template_options import TemplateOptions
from server.api.generation.tool_calls import (
    CLOSING,
    OPENING,
    HermesReader,
    MakeReader,
    NamedCallReader,
    RequiredCallReader,
)
from server.api.generation.tools import (
    MAX_TOOLS,
    Messages,
    NamedTool,
    Tool,
    ToolChoice,
    check_choice,
    forced_constraint,
    shown_tools,
)
from server.api.inference.ensemble import MAX_MEMBERS, EnsembleBody
from server.api.request_body import RequestBody, check_unicode
from server.api.structured.guided import GuidedBody
from server.api.structured.structured_outputs import ResponseFormat, StructuredOutputs
from server.engine.constraints import Constraint
from server.engine.types import MAX_PRIORITY, MIN_PRIORITY
from server.errors import InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_TIMEOUT_SECONDS = 86400.0
MAX_LOGIT_BIAS_TOKENS = 1024
MAX_CHOICES = 128
MAX_PROMPTS = 16_384
MAX_TOP_LOGPROBS = 20
MAX_TOKEN_ID_DIGITS = 18
MAX_ECHOED_LOGPROBS = 1_000_000
"""Maximum number of log-probabilities of one request's echoed prompts; they are held in memory until the response."""

DEFAULT_COMPLETION_TOKENS = 16
_INT64 = 2**63


def _prompts(value: object) -> list[str] | list[list[int]]:
    """Convert the four forms of ``prompt`` to a list of texts or a list of token id lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("should be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise ValueError("should not be empty")
    if not _is_token_id(value[0]) and len(value) > MAX_PROMPTS:
        raise ValueError(f"should have at most {MAX_PROMPTS} texts, not {len(value)}")
    if "" in value or [] in value:
        raise ValueError("should not be empty")
    if all(isinstance(item, str) for item in value):
        check_unicode(value)
        return value
    if all(_is_token_id(item) for item in value):
        return [value]
    if all(isinstance(item, list) and all(_is_token_id(token) for token in item) for item in value):
        return value
    raise ValueError("should hold only strings, only token ids (integers from 0), or only lists of token ids")


def _is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _INT64


def _task_ids(value: object) -> int | list[int | None]:
    """One task id, or one for each member."""
    if _is_token_id(value):
        return value  # type: ignore[return-value]
    if not isinstance(value, list):
        raise ValueError("should be an integer from 0, or a list of them")
    if len(value) > MAX_MEMBERS or not all(item is None or _is_token_id(item) for item in value):
        raise ValueError(f"should have at most {MAX_MEMBERS} items, each an integer from 0 or null")
    return value


def _stop(value: object) -> list[str]:
    """One stop string or a list of them, as a list."""
    stop = [value] if isinstance(value, str) else value
    if isinstance(stop, list) and len(stop) > MAX_STOP_STRINGS:
        raise ValueError(f"should have at most {MAX_STOP_STRINGS} strings, not {len(stop)}")
    if not isinstance(stop, list) or not all(isinstance(item, str) for item in stop):
        raise ValueError("should be a string or a list of strings")
    if not all(0 < len(item) <= MAX_STOP_STRING_CHARS for item in stop):
        raise ValueError(f"should hold strings of 1 to {MAX_STOP_STRING_CHARS} characters")
    check_unicode(stop)
    return stop


def _logit_bias(value: object) -> dict[int, float]:
    """Biases by token id, which is a string in JSON."""
    if not isinstance(value, dict):
        raise ValueError("should be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIAS_TOKENS:
        raise ValueError(f"should have at most {MAX_LOGIT_BIAS_TOKENS} tokens, not {len(value)}")
    bias: dict[int, float] = {}
    for key, item in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_ID_DIGITS):
            raise ValueError("should have token ids as keys, such as '50256'")
        if isinstance(item, bool) or not isinstance(item, int | float) or not -100 <= item <= 100:
            raise ValueError("should have biases from -100 to 100")
        bias[int(key)] = float(item)
    return bias


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stop = Annotated[list[str], PlainValidator(_stop, json_schema_input_type=str | list[str])]
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])]
TokenId = Annotated[int, Field(ge=0, lt=_INT64)]
TaskId = Annotated[int | None, Field(ge=0, lt=_INT64, description="Task id of a multitask prompt, from 0.")]
TaskIds = Annotated[
    int | list[int | None] | None,
    PlainValidator(_task_ids, json_schema_input_type=Annotated[int, Field(ge=0)] | list[int | None]),
    Field(
        description="Task id of a multitask prompt, from 0. With `ensemble: each`, also a list with the task of each "
        "member, null for those without."
    ),
]
Priority = Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY, description="Lower values are scheduled first.")]
ServiceTier = Annotated[
    str | None,
    Field(
        description="`batch` (or `flex`): served in what other requests leave, without the limit of the time in the "
        "queue; all other values are the interactive tier."
    ),
]
Timeout = Annotated[
    float | None,
    Field(
        gt=0.0,
        le=MAX_TIMEOUT_SECONDS,
        description="Maximum time in the queue, in seconds; then the request fails.",
    ),
]


User = Annotated[
    str | None,
    Field(
        description="Who the request is for. During a rollout, requests of one user are answered by one version; the "
        "header `X-Prelude-Sticky-Key` comes first."
    ),
]


class StreamOptions(RequestBody):
    """Options of a stream."""

    include_usage: bool = Field(False, description="Send a last chunk with the usage and no choices.")
    continuous_usage_stats: bool = Field(False, description="Include the usage so far in every chunk.")


class GenerationBody(GuidedBody, KnownFieldsBody):
    """Fields that completions and chat completions share."""

    unsupported: ClassVar[Mapping[str, Refused]] = EVERYWHERE

    task_id: TaskIds = None
    stream: bool = Field(False, description="Whether to stream the response as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Options of the stream; only with `stream`.")
    temperature: float = Field(
        1.0, ge=0.0, le=2.0, description="Sampling temperature; 0 selects the most likely token."
    )
    top_p: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Sample from the smallest set of most likely tokens with at least this total probability.",
    )
    top_k: int = Field(
        0, ge=-1, lt=_INT64, description="Sample from this number of most likely tokens; 0 or -1: all."
    )
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="Drop tokens below this share of the highest probability.")
    presence_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="Subtracted from the logit of every token that was generated."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="Subtracted from the logit of a token for each time that it was generated."
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=100.0,
        description="Penalty on every token so far: divides positive logits and multiplies negative ones.",
    )
    logit_bias: LogitBias = Field({}, description="Bias added to the logits, by token id.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Number of choices per prompt.")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="Random seed of the sampling.")
    max_tokens: int | None = Field(None, ge=1, lt=_INT64, description="Maximum number of new tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64, description="Newer name of `max_tokens`.")
    min_tokens: int = Field(
        0,
        ge=0,
        lt=_INT64,
        description="Minimum number of new tokens before an end-of-sequence token; stop strings still apply.",
    )
    response_format: ResponseFormat | None = Field(None, description="Structured output, in OpenAI's format.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Structured output, in vLLM's format.")
    stop: Stop = Field([], description="Strings that end the text.")
    stop_token_ids: list[TokenId] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS, fail_fast=True, description="Tokens that end the text."
    )
    ignore_eos: bool = Field(False, description="Whether to continue after end-of-sequence tokens.")
    include_stop_str_in_output: bool = Field(False, description="Whether the text includes the stop string.")
    skip_special_tokens: bool = Field(True, description="Whether to leave special tokens out of the text.")
    priority: Priority = 0
    timeout: Timeout = None
    service_tier: ServiceTier = None
    user: User = None
    return_token_ids: bool = Field(False, description="Add `token_ids` and `prompt_token_ids` to each choice.")
    return_timings: bool = Field(
        False, description="Add `timings` to each choice, and `step`, the engine's step, to each chunk of a stream."
    )
    _constraint: tuple[str, Constraint] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_single_structure(self) -> Self:
        constraints = self.guided_constraints
        if self.structured_outputs is not None and self.structured_outputs.constraint is not None:
            constraints.insert(0, ("structured_outputs", self.structured_outputs.constraint))
        if self.response_format is not None and self.response_format.constraint is not None:
            constraints.insert(0, ("response_format", self.response_format.constraint))
        if len(constraints) > 1:
            first, second = constraints[0][0], constraints[1][0]
            raise InvalidRequestError(f"{second}: cannot be combined with {first}", param=second)
        self._constraint = constraints[0] if constraints else None
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: only allowed with stream", param="stream_options")
        return self

    @property
    def single_task(self) -> int | None:
        """The task of the request, unless each member has its own."""
        return None if isinstance(self.task_id, list) else self.task_id

    @property
    def constraint(self) -> Constraint | None:
        """The required structure of the text; None for any text."""
        return None if self._constraint is None else self._constraint[1]

    @property
    def constraint_field(self) -> str | None:
        """The field that requires the structure."""
        return None if self._constraint is None else self._constraint[0]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def token_limit(self) -> int | None:
        """The requested number of new tokens; None for the endpoint's default."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def shown_special_tokens(self) -> Collection[str]:
        """Special tokens that are always kept in the text, even with ``skip_special_tokens``."""
        return ()

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of most likely tokens to return per new token; None for no logprobs."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether choices begin with their prompt."""
        return False

    @property
    def text_field(self) -> str:
        """The field that contains the text."""
        return "prompt"

    @property
    def applies_format(self) -> bool:
        """Whether the version's prompt format is applied, with its sampling defaults."""
        return True


class MembersBody(EnsembleBody, GenerationBody):
    """A request that several members may answer, each with choices of its own."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if isinstance(self.task_id, list):
            if not self.gives_each:
                raise InvalidRequestError('task_id: a list requires "ensemble": "each"', param="task_id")
            if len(self.task_id) != len(self.member_names):
                raise InvalidRequestError(
                    f"task_id: {len(self.task_id)} tasks for {len(self.member_names)} members", param="task_id"
                )
        return self

    @property
    def may_repeat(self) -> bool:
        """Whether a name may stand there twice: with another task."""
        return self.gives_each and isinstance(self.task_id, list)

    @property
    def tasks(self) -> list[int | None]:
        """The task of each member."""
        return self.task_id if isinstance(self.task_id, list) else [self.task_id] * len(self.member_names)


class CompletionBody(MembersBody):
    """``POST /v1/completions``."""

    unsupported: ClassVar[Mapping[str, Refused]] = {**EVERYWHERE, **COMPLETIONS}

    prompt: Prompts = Field(
        description="One or more texts: a string, a list of strings, token ids, or a list of token id lists."
    )
    max_tokens: int | None = Field(
        None, ge=0, lt=_INT64, description="Maximum number of new tokens; 0 requires `echo`."
    )
    echo: bool = Field(False, description="Start the text and logprobs of each choice with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Number of most likely tokens to return per token."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Whether to add the tokenizer's special tokens to the text; default: true, except for a chat "
        "template that `apply_format` applies.",
    )
    apply_format: bool = Field(
        False, description="Put each text into the prompt format of the soft prompt, with its sampling defaults."
    )

    @model_validator(mode="after")
    def _check_token_limit(self) -> Self:
        if self.token_limit == 0 and not self.echo:
            raise InvalidRequestError("max_tokens: 0 is only allowed with echo", param="max_tokens")
        return self

    @model_validator(mode="after")
    def _check_ensemble(self) -> Self:
        if not self.is_ensemble or self.gives_each:
            return self
        if self.combine == "mean":
            if self.echo and self.logprobs is not None:
                raise InvalidRequestError(
                    "echo: with logprobs, cannot be combined with several soft prompts", param="echo"
                )
            return self
        for name, is_set in (("stream", self.stream), ("n", self.n > 1), ("echo", self.echo)):
            if is_set:
                raise InvalidRequestError(
                    f'{name}: not allowed when several soft prompts vote; use "ensemble": "mean" or "each"',
                    param=name,
                )
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of most likely tokens to return per token; None for no logprobs."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """Whether choices begin with their prompt."""
        return self.echo

    @property
    def applies_format(self) -> bool:
        """Whether the version's prompt format is applied, with its sampling defaults."""
        return self.apply_format


class ChatBody(TemplateOptions, MembersBody):
    """``POST /v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, Refused]] = {**EVERYWHERE, **CHAT}

    messages: Messages = Field(description="The conversation.")
    logprobs: bool = Field(False, description="Whether to return the log-probabilities of the new tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Only with `logprobs`.")
    add_special_tokens: bool | None = Field(
        None,
        description="Add special tokens; default: false, because most chat templates contain them, but true for a "
        "soft prompt with the format raw or template.",
    )
    tools: list[Tool] = Field(
        [], max_length=MAX_TOOLS, fail_fast=True, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="Default: `auto` if there are tools.")
    parallel_tool_calls: bool = Field(True, description="Whether an answer may contain several calls.")

    @model_validator(mode="after")
    def _check_each(self) -> Self:
        if self.is_ensemble and not self.gives_each:
            raise InvalidRequestError(
                'ensemble: a chat with several members needs "ensemble": "each"', param="ensemble"
            )
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        check_choice(self.tools, self.tool_choice)
        forced = forced_constraint(self.tools, self.tool_choice)
        if forced is not None:
            if self._constraint is not None:
                field = self._constraint[0]
                raise InvalidRequestError(
                    f"tool_choice: a forced call leaves no room for {field}", param="tool_choice"
                )
            self._constraint = ("tools", forced)
        return self

    @property
    def text_field(self) -> str:
        """The field that contains the text."""
        return "messages"

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools as chat templates expect them; empty if the model may not call any."""
        return [] if self.tool_choice == "none" else shown_tools(self.tools)

    @property
    def shown_special_tokens(self) -> Collection[str]:
        """The tags that mark tool calls, if the model may make some; special tokens for some models."""
        return (OPENING, CLOSING) if self.tools and self.tool_choice in (None, "auto") else ()

    @property
    def make_reader(self) -> MakeReader | None:
        """The reader of tool calls in the generated text; None if no calls are possible."""
        if isinstance(self.tool_choice, NamedTool):
            return partial(NamedCallReader, self.tool_choice.function.name)
        if self.tool_choice == "required":
            return RequiredCallReader
        if not self.tools or self.tool_choice == "none":
            return None
        names = frozenset(tool.function.name for tool in self.tools)
        return partial(HermesReader, names, allows_several=self.parallel_tool_calls)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs: requires logprobs: true", param="top_logprobs")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of most likely tokens to return per new token; None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
