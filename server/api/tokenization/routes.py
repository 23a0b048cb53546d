"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info`` in vLLM's format, which the evaluation harness uses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

import msgspec
from fastapi import APIRouter, Depends
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from prompt_store.types import PromptVersion
from server.api.generation.bodies import TokenId
from server.api.generation.known_fields import CHAT, EVERYWHERE, KnownFieldsBody, Refused
from server.api.generation.prompt_text import format_of, text_of_conversation
from server.api.generation.template_options import TemplateOptions
from server.api.generation.tools import MAX_TOOLS, Messages, Tool, shown_tools
from server.api.inference.entry import entered_for_text
from server.api.inference.pair import versions_of
from server.api.inference.target import resolve
from server.api.inference.token_ids import check_token_ids
from server.api.json_budget import MOST_TOKENS
from server.api.keys.callers import Caller, CallerDep, Scope
from server.api.operations import Operation, Quota
from server.api.request_body import RequestBody, check_unicode, require_json
from server.api.services import Services, ServicesDep, require_ready
from server.errors import InvalidRequestError

router = APIRouter(tags=["tokenizer"], dependencies=[Depends(require_ready)])

MAX_TEXT_CHARS = 1_000_000
MAX_TOKENS = MOST_TOKENS


def _text(value: str) -> str:
    check_unicode([value])
    return value


class TokenizeBody(TemplateOptions, KnownFieldsBody):
    """``POST /tokenize``: a text, or a conversation to format with the model's chat template."""

    unsupported: ClassVar[Mapping[str, Refused]] = {
        "chat_template": CHAT["chat_template"],
        "truncate_prompt_tokens": EVERYWHERE["truncate_prompt_tokens"],
    }

    model: str | None = Field(
        None, description="A model name, checked as in a completion; all models share one tokenizer."
    )
    prompt_id: str | None = Field(
        None, description="A soft prompt or an adapter, as in a completion; its prompt format applies to `messages`."
    )
    adapter_id: str | None = Field(None, description="An adapter, checked as in a completion.")
    prompt: Annotated[str, AfterValidator(_text)] | None = Field(
        None,
        max_length=MAX_TEXT_CHARS,
        examples=["My invoice is wrong"],
        description="The text; not with `messages`.",
    )
    messages: Messages | None = Field(
        None, description="A conversation to format with the chat template; not with `prompt`."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Add special tokens; default: true for `prompt`, and for `messages` as in a chat completion.",
    )
    tools: list[Tool] = Field(
        [], max_length=MAX_TOOLS, description="Tools of the conversation, passed to the template."
    )
    return_token_strs: bool = Field(False, description="Return the vocabulary entry of each token.")

    @model_validator(mode="after")
    def _check_that_there_is_one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("prompt: send either prompt or messages", param="prompt")
        return self


class TokenizeReply(BaseModel):
    """The tokens of a text, without virtual tokens of soft prompts."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int = Field(description="Maximum length of a sequence, virtual tokens included.")
    tokens: list[int] = Field(description="Token ids, in order.")
    token_strs: list[str] | None = Field(None, description="Vocabulary entry of each token; null unless requested.")


class DetokenizeBody(RequestBody):
    """``POST /detokenize``: convert tokens to text, including special tokens."""

    model: str | None = Field(
        None, description="A model name, checked as in a completion; all models share one tokenizer."
    )
    prompt_id: str | None = Field(
        None, description="A soft prompt or an adapter, checked as in a completion; it does not change the tokens."
    )
    adapter_id: str | None = Field(None, description="An adapter, checked as in a completion.")
    tokens: list[TokenId] = Field(
        max_length=MAX_TOKENS, fail_fast=True, examples=[[65, 66]], description="Token ids, in order."
    )


class DetokenizeReply(BaseModel):
    """The text of the tokens."""

    prompt: str = Field(description="The text of the tokens.")


class TokenizerInfoReply(BaseModel):
    """The configuration of the tokenizer, including other keys."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str = Field(description="Class name in transformers.")
    model_max_length: int = Field(description="Maximum length of a sequence on this server.")
    bos_token: str | None = Field(description="The beginning-of-sequence token.")
    eos_token: str | None = Field(description="The end-of-sequence token.")
    pad_token: str | None = Field(description="The padding token.")
    unk_token: str | None = Field(description="The unknown token.")
    chat_template: str | None = Field(description="The chat template of the model, in Jinja.")


@router.post("/tokenize", dependencies=[Depends(require_json)], response_model=TokenizeReply)
@Operation(
    scopes={Scope.GENERATE},
    errors=(404, 503),
    quota=Quota.TOKENS,
    example={"prompt": "The strap feels flimsy.", "return_token_strs": True},
)
async def tokenize(body: TokenizeBody, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """Convert text to token ids, as completions and chat completions do."""
    num_chars = len(body.prompt or "") + sum(len(message.content or "") for message in body.messages or ())
    if num_chars > MAX_TEXT_CHARS:
        raise InvalidRequestError(f"messages: at most {MAX_TEXT_CHARS} characters are allowed", param="messages")
    with entered_for_text(services, request, num_chars):
        versions = await _check_model(services, caller, body)
        tokenizer = services.tokenizer
        if body.messages is not None:
            formatted = await text_of_conversation(
                services,
                format_of(versions),
                body.messages,
                options=body,
                tools=shown_tools(body.tools),
            )
            text, adds = formatted.text, formatted.add_special_tokens
            if len(text) > MAX_TEXT_CHARS:  # it includes tools, reasoning and calls
                raise InvalidRequestError(
                    f"messages: the template writes {len(text)} characters; at most {MAX_TEXT_CHARS} are allowed",
                    param="messages",
                )
            add_special_tokens = adds if body.add_special_tokens is None else body.add_special_tokens
        else:
            text, add_special_tokens = body.prompt or "", body.add_special_tokens is not False
        (tokens,) = await tokenizer.encode([text], add_special_tokens=add_special_tokens)
        token_strs = await asyncio.to_thread(tokenizer.token_strings, tokens) if body.return_token_strs else None
    # Pydantic would check up to a million tokens one by one.
    reply = {
        "count": len(tokens),
        "max_model_len": services.engine.model.max_model_len,
        "tokens": tokens,
        "token_strs": token_strs,
    }
    encoded = await asyncio.to_thread(msgspec.json.encode, reply)
    return Response(encoded, media_type="application/json")


@router.post("/detokenize", dependencies=[Depends(require_json)])
@Operation(
    scopes={Scope.GENERATE},
    errors=(404, 503),
    quota=Quota.TOKENS,
    takes_token_ids=True,
    example={"tokens": [200, 451]},
)
async def detokenize(
    body: DetokenizeBody, request: Request, services: ServicesDep, caller: CallerDep
) -> DetokenizeReply:
    """Convert token ids to text."""
    with entered_for_text(services, request, 0, num_tokens=len(body.tokens)):
        await _check_model(services, caller, body)
        check_token_ids(body.tokens, vocab_size=services.engine.model.vocab_size, param="tokens")
        text = await asyncio.to_thread(services.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeReply(prompt=text)


@router.get("/tokenizer_info")
@Operation(scopes={Scope.GENERATE})
async def tokenizer_info(services: ServicesDep) -> TokenizerInfoReply:
    """Get the tokenizer's configuration: special tokens and chat template."""
    info = {**services.tokenizer.info, "model_max_length": services.engine.model.max_model_len}
    return TokenizerInfoReply.model_validate(info)


async def _check_model(
    services: Services, caller: Caller, body: TokenizeBody | DetokenizeBody
) -> list[PromptVersion]:
    names = body.model, body.prompt_id, body.adapter_id
    return await versions_of(services, resolve(*names, base_name=services.base_name, access=caller.access))
