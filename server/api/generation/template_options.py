"""Request fields that are passed to the chat template of the model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from prompt_store.files.strict_json import check_depth
from server.api.request_body import RequestBody, check_unicode
from server.errors import InvalidRequestError

MAX_TEMPLATE_CHARS = 32 * 1024
"""Maximum size of ``chat_template_kwargs`` or ``documents`` as JSON."""

MAX_TEMPLATE_DEPTH = 64
MAX_DOCUMENTS = 128

RESERVED = frozenset(
    {
        # Set by other fields, or not allowed.
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    }
)
"""Parameter names of transformers' ``apply_chat_template``."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _bounded(value: Any) -> Any:
    check_depth(value, MAX_TEMPLATE_DEPTH)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"should have at most {MAX_TEMPLATE_CHARS} characters as JSON")
    check_unicode([text])
    return value


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(RESERVED & value.keys()):
        raise ValueError(f"should not set {taken[0]!r}: it is not a variable of the template")
    return value


class TemplateOptions(RequestBody):
    """vLLM's template fields, and OpenAI's reasoning effort."""

    add_generation_prompt: bool | None = Field(
        None, description="Whether the template starts an answer; default: true unless `continue_final_message`."
    )
    continue_final_message: bool = Field(
        False, description="Continue the last message instead of starting a new one."
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_bounded), AfterValidator(_variables)] = Field(
        {}, description="Variables for the template, such as `enable_thinking`."
    )
    documents: Annotated[list[dict[str, Any]], AfterValidator(_bounded)] = Field(
        [],
        max_length=MAX_DOCUMENTS,
        description="Documents for templates that use them, each with `title` and `text`.",
    )
    reasoning_effort: Effort | None = Field(None, description="Reasoning effort, passed to the template.")

    @model_validator(mode="after")
    def _check_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "add_generation_prompt: cannot be combined with continue_final_message", param="add_generation_prompt"
            )
        return self

    @property
    def template_options(self) -> dict[str, Any]:
        """Keyword arguments of transformers' ``apply_chat_template``."""
        begins = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        options: dict[str, Any] = {"add_generation_prompt": begins}
        if self.continue_final_message:
            options["continue_final_message"] = True
        if self.documents:
            options["documents"] = self.documents
        if self.reasoning_effort is not None:
            # As in vLLM: templates use one of the two.
            options["reasoning_effort"] = self.reasoning_effort
            options["enable_thinking"] = self.reasoning_effort != "none"
        return options | self.chat_template_kwargs
