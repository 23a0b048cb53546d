"""The text that a version is asked with: a conversation or a bare text in the version's prompt format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_store.formats import FormatType, PromptFormat
from prompt_store.types import PromptVersion
from server.api.generation.template_options import TemplateOptions
from server.api.generation.tools import ChatMessage
from server.api.inference.format_templates import render
from server.api.inference.pair import LeasedPair
from server.api.services import Services
from server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class PromptText:
    """A text to tokenise.

    Attributes:
        text: The text.
        add_special_tokens: Whether the tokenizer adds its special tokens, unless the request says otherwise; chat
            templates contain them.
    """

    text: str
    add_special_tokens: bool


async def text_of_conversation(
    services: Services,
    prompt_format: PromptFormat | None,
    messages: Sequence[ChatMessage],
    *,
    options: TemplateOptions,
    tools: Sequence[Mapping[str, Any]] = (),
    needs_tools: bool = False,
) -> PromptText:
    """Format a conversation as a version expects it: by the model's chat template, or the last message alone.

    Args:
        services: The server.
        prompt_format: The version's format; None formats by the chat template.
        messages: The conversation.
        options: Fields of the request for the chat template.
        tools: Tools that the template may show.
        needs_tools: Whether it must show them.

    Raises:
        InvalidRequestError: If the model has no chat template, or it rejects the conversation; or if the version is
            asked without one, and the conversation has anything but one message of the user.
    """
    if prompt_format is not None and prompt_format.type is not FormatType.CHAT:
        text = _only_text(messages, prompt_format.type)
        _check_unused(options, prompt_format.type, has_tools=bool(tools) and needs_tools)
        return PromptText(_of_own_format(prompt_format, text, "messages"), add_special_tokens=True)
    turns = [message.turn for message in messages]
    _require_chat_template(services, "messages")
    text = await services.tokenizer.render_chat(
        _with_system(prompt_format, turns), tools=tools, needs_tools=needs_tools, options=options.template_options
    )
    return PromptText(text, add_special_tokens=False)


async def texts_in_format(
    services: Services, prompt_format: PromptFormat, texts: Sequence[str] | Sequence[list[int]], *, field: str
) -> list[PromptText]:
    """Put each text into a format.

    Raises:
        InvalidRequestError: If there are token ids instead of texts, or a text cannot be formatted.
    """
    found = []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidRequestError(f"apply_format: requires {field} as text, not token ids", param="apply_format")
        if prompt_format.type is FormatType.CHAT:
            _require_chat_template(services, "apply_format")
            turns = _with_system(prompt_format, [{"role": "user", "content": text}])
            found.append(PromptText(await services.tokenizer.render_chat(turns), add_special_tokens=False))
        else:
            found.append(PromptText(_of_own_format(prompt_format, text, field), add_special_tokens=True))
    return found


def format_of(versions: Sequence[PromptVersion]) -> PromptFormat | None:
    """The format of a pair, its soft prompt's before its adapter's; None if neither is known."""
    return next((version.format for version in versions if version.format is not None), None)


def format_to_apply(leased: Sequence[LeasedPair], base_name: str) -> PromptFormat:
    """The format that the versions of a request share.

    Raises:
        InvalidRequestError: If the format of one is not known, or two differ.
    """
    formats = []
    for pair in leased:
        found = format_of(pair.versions)
        if found is None:
            raise InvalidRequestError(
                f"apply_format: the format of {pair.name or base_name} is not known; leave apply_format "
                "out and send the whole text",
                param="apply_format",
            )
        formats.append(found)
    if any(found != formats[0] for found in formats):
        raise InvalidRequestError("apply_format: the members have different formats", param="apply_format")
    return formats[0]


def _of_own_format(prompt_format: PromptFormat, text: str, field: str) -> str:
    if prompt_format.template is None:
        return text
    try:
        return render(prompt_format.template, text)
    except ValueError as error:
        raise InvalidRequestError(f"{field}: {error}", param=field) from error


def _with_system(prompt_format: PromptFormat | None, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, after the format's system message if they have none."""
    system = None if prompt_format is None else prompt_format.system
    if system is None or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _only_text(messages: Sequence[ChatMessage], kind: FormatType) -> str:
    last = messages[-1]
    if last.role != "user":
        raise InvalidRequestError(
            f"messages: the soft prompt has the format {kind}: the last message must be the user's, not the "
            f"{last.role}'s",
            param="messages",
        )
    if len(messages) > 1:
        raise InvalidRequestError(
            f"messages: the soft prompt has the format {kind}: send one message of the user, without system and "
            "earlier messages",
            param="messages",
        )
    return last.content or ""


def _check_unused(options: TemplateOptions, kind: FormatType, *, has_tools: bool) -> None:
    """Refuse fields that only a chat template could use."""
    used = {
        "tools": has_tools,
        "documents": bool(options.documents),
        "continue_final_message": options.continue_final_message,
        "chat_template_kwargs": bool(options.chat_template_kwargs),
    }
    for name, is_used in used.items():
        if is_used:
            raise InvalidRequestError(
                f"{name}: the soft prompt has the format {kind}, which has no place for it", param=name
            )


def _require_chat_template(services: Services, param: str) -> None:
    if not services.tokenizer.has_chat_template:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions, or serve a chat model", param=param
        )
