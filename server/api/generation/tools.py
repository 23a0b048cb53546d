"""Tools and messages in OpenAI's format, and the constraint of a forced tool call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from prompt_store.files.strict_json import parse_json
from server.api.json_budget import num_values
from server.api.request_body import RequestBody, check_unicode, half_pair_in
from server.api.structured.schema_checks import MAX_CONSTRAINT_CHARS, MAX_SCHEMA_DEPTH, text_of
from server.api.structured.schema_numbers import VALUE_KEYWORDS, subschemas
from server.api.structured.structured_outputs import Schema, schema_constraint
from server.engine.constraints import Constraint
from server.errors import InvalidRequestError, UnsupportedError

MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_MESSAGES = 4096
MAX_PARTS = 4096
"""Maximum number of text parts of one message."""

MAX_CALLS_IN_ALL = 4096
"""Maximum number of calls in all messages of a conversation."""

MAX_ARGUMENT_CHARS = 1024 * 1024
"""Maximum size of the arguments of all calls together, as JSON."""

MAX_ARGUMENT_VALUES = 32_768
"""Maximum number of JSON values in them."""

_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def _chat_text(value: object) -> str:
    """The content of a message: a string, or text parts, which are joined by newlines."""
    if isinstance(value, str):
        check_unicode([value])
        return value
    if not isinstance(value, list):
        raise ValueError("should be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"should have at most {MAX_PARTS} text parts, not {len(value)}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("should hold only text parts: {'type': 'text', 'text': '...'}")
        texts.append(part["text"])
    check_unicode(texts)
    return "\n".join(texts)


def _arguments(value: object) -> dict[str, Any]:
    """The arguments of a call as an object, which the chat template formats; they are sent as JSON text or object."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        arguments = parse_json(text or "{}", max_depth=MAX_SCHEMA_DEPTH)
    except (ValueError, RecursionError) as error:
        raise ValueError("should be a JSON object, or a string that holds one") from error
    if not isinstance(arguments, dict):
        raise ValueError("should be a JSON object, or a string that holds one")
    if half_pair_in(arguments) is not None:
        raise ValueError("should be Unicode: its JSON has half of a surrogate pair")
    return arguments


ChatText = Annotated[str, PlainValidator(_chat_text, json_schema_input_type=str | list[dict[str, str]])]


class FunctionCall(RequestBody):
    """The function that the model called."""

    name: str = Field(pattern=_NAME, description="Name of the function.")
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments, json_schema_input_type=str | dict[str, Any])] = (
        Field(description="Arguments of the call: a JSON object, or a string that contains one.")
    )


class ToolCall(RequestBody):
    """One call in an assistant's message."""

    id: str = Field(description="Identifier of the call.")
    type: Literal["function"] = Field("function", description="Always `function`.")
    function: FunctionCall = Field(description="The called function.")


class ChatMessage(RequestBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Role of the author; `developer` is the same as `system`."
    )
    name: str | None = Field(None, description="Name of the author, passed to the template.")
    tool_calls: list[ToolCall] = Field(
        [], max_length=MAX_TOOL_CALLS, fail_fast=True, description="Tool calls of an assistant message."
    )
    content: ChatText | None = Field(
        None, validate_default=True, description="Text of the message; optional for the roles assistant and tool."
    )
    reasoning: str | None = Field(None, description="Reasoning of the assistant, passed to the template.")
    reasoning_content: str | None = Field(None, description="Older name of `reasoning`.")
    tool_call_id: str | None = Field(
        None, validate_default=True, description="Id of the call that a message of role `tool` answers."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        if isinstance(value, dict):
            for name, instead in (("function_call", "tool_calls"), ("audio", "content")):
                if value.get(name) is not None:
                    param = f"messages.{name}"
                    raise UnsupportedError(f"{param}: not supported by this server; send {instead}", param=param)
        return value

    @field_validator("tool_calls")
    @classmethod
    def _check_caller_role(cls, value: list[ToolCall], info: ValidationInfo) -> list[ToolCall]:
        if value and info.data.get("role") != "assistant":
            raise ValueError("is only allowed in assistant messages")
        return value

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("role") not in ("assistant", "tool"):
            raise ValueError("should be a string or a list of text parts")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _check_answered_call(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is not None) != (info.data.get("role") == "tool"):
            raise ValueError("is required in messages of role tool, and only there")
        return value

    @property
    def turn(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": self.content or ""}
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        if reasoning is not None:
            turn["reasoning"] = turn["reasoning_content"] = reasoning
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


def _messages(value: object) -> object:
    """Bound a conversation before any message is validated."""
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("should not be empty")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"should have at most {MAX_MESSAGES} messages, not {len(value)}")
    calls = [
        call
        for message in value
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list)
        for call in message["tool_calls"]
    ]
    if len(calls) > MAX_CALLS_IN_ALL:
        raise ValueError(f"should have at most {MAX_CALLS_IN_ALL} calls together, not {len(calls)}")
    functions = [
        call["function"] for call in calls if isinstance(call, dict) and isinstance(call.get("function"), dict)
    ]
    arguments = [text for function in functions if isinstance(text := function.get("arguments"), str)]
    num_chars = sum(map(len, arguments))
    if num_chars > MAX_ARGUMENT_CHARS:
        raise ValueError(
            f"should have at most {MAX_ARGUMENT_CHARS} characters of arguments together, not {num_chars}"
        )
    if num_values(",".join(arguments).encode(errors="replace"), MAX_ARGUMENT_VALUES) > MAX_ARGUMENT_VALUES:
        raise ValueError(f"should have at most {MAX_ARGUMENT_VALUES} values in arguments together")
    return value


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(_messages)
]


class Function(RequestBody):
    """A function that the model may call."""

    name: str = Field(pattern=_NAME, description="Name of the function.")
    description: str | None = Field(
        None, max_length=MAX_CONSTRAINT_CHARS, description="Description of the function, for the model."
    )
    parameters: Schema = Field(_NO_PARAMETERS, description="JSON schema of the function's arguments.")
    strict: bool = Field(
        False, description="Reject schema keywords that cannot be enforced instead of ignoring them."
    )


class Tool(RequestBody):
    """A tool; all are functions."""

    type: Literal["function"] = Field(description="Always `function`.")
    function: Function = Field(description="The function.")


class NamedFunction(RequestBody):
    """The name of a function."""

    name: str = Field(pattern=_NAME, description="Name of the function.")


class NamedTool(RequestBody):
    """The tool that the model must call."""

    type: Literal["function"] = Field(description="Always `function`.")
    function: NamedFunction = Field(description="The function to call.")


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def shown_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def check_choice(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Check a tool choice.

    Raises:
        InvalidRequestError: If two tools have the same name, or the choice forces a tool that does not exist.
    """
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequestError("tools: two functions have the same name", param="tools")
    if not tools and choice not in (None, "none", "auto"):
        raise InvalidRequestError("tool_choice: requires tools", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequestError(
            f"tool_choice: {choice.function.name!r} is not one of the tools", param="tool_choice"
        )


def forced_constraint(tools: Sequence[Tool], choice: ToolChoice | None) -> Constraint | None:
    """The constraint of a tool choice: the arguments of a named function, or one call of any; None if free.

    Raises:
        InvalidRequestError: If the tools together are too long.
    """
    if isinstance(choice, NamedTool):
        function = next(tool.function for tool in tools if tool.function.name == choice.function.name)
        return schema_constraint(function.parameters, is_strict=function.strict)
    if choice != "required":
        return None
    functions = [tool.function for tool in tools]
    schema = {
        "anyOf": [_call_schema(function.name) for function in functions],
        "$defs": {
            function.name: _embedded(function.parameters, f"prelude://tool{index}/schema")
            for index, function in enumerate(functions)
        },
    }
    _check_identifiers(functions)
    if len(text_of(schema)) > MAX_CONSTRAINT_CHARS:
        raise InvalidRequestError(
            f"tools: with tool_choice 'required', at most {MAX_CONSTRAINT_CHARS} characters together",
            param="tools",
        )
    return schema_constraint(schema, is_strict=all(function.strict for function in functions))


def _call_schema(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _embedded(schema: dict[str, Any], uri: str) -> dict[str, Any]:
    """Embed a schema in another as a separate resource, so that its references and anchors stay valid.

    Args:
        schema: A schema of bounded depth.
        uri: New ``$id`` of the schema, because two functions may have the same.
    """
    own = schema.get("$id")
    old = own.removesuffix("#") if isinstance(own, str) else ""
    moved = _renamed(schema, old, uri) if old else schema
    return {**moved, "$id": uri}


def _renamed(node: Any, old: str, new: str) -> Any:
    """Change the references to one resource in a schema to another resource."""
    if isinstance(node, list):
        return [_renamed(item, old, new) for item in node]
    if not isinstance(node, Mapping):
        return node
    moved = {key: item if key in VALUE_KEYWORDS else _renamed(item, old, new) for key, item in node.items()}
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.partition("#")[0] == old:
        moved["$ref"] = new + reference[len(old) :]
    return moved


def _check_identifiers(functions: Sequence[Function]) -> None:
    """Check that different schemas inside the functions do not have the same absolute ``$id``.

    Raises:
        InvalidRequestError: If two have.
    """
    known: dict[str, Any] = {}
    for function in functions:
        for node in subschemas(function.parameters):
            name = node.get("$id")
            if node is function.parameters or not isinstance(name, str) or ":" not in name:
                continue
            if known.setdefault(name, node) != node:
                raise InvalidRequestError(
                    f"tools: with tool_choice 'required', two schemas have the $id {name[:100]!r}", param="tools"
                )
