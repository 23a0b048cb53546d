"""OpenAI's routes: completions and chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Depends
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from prompt_store.formats import PromptFormat
from server.api.errors import ErrorReply, describe
from server.api.generation.bodies import (
    DEFAULT_COMPLETION_TOKENS,
    ChatBody,
    CompletionBody,
    GenerationBody,
    MembersBody,
)
from server.api.generation.each import prepare_each
from server.api.generation.generation import prepare
from server.api.generation.prompt_text import format_of, format_to_apply, text_of_conversation, texts_in_format
from server.api.generation.voting import vote
from server.api.generation.writers import ChatWriter, Choices, CompletionWriter, Writer, collect
from server.api.http.sse import DONE, EventStream, event
from server.api.inference.call import Call
from server.api.inference.ensemble import targets_of, targets_of_each
from server.api.inference.entry import is_batch_tier
from server.api.inference.member_faults import MemberFaults
from server.api.inference.pair import LeasedPair
from server.api.inference.request_record import RequestRecord, begin_record
from server.api.inference.responses import ChatCompletion, ChatCompletionChunk, Completion
from server.api.inference.target import Target
from server.api.keys.callers import Scope, caller_of
from server.api.operations import Operation, Quota
from server.api.request_body import require_json
from server.api.services import Services, ServicesDep, require_ready

router = APIRouter(prefix="/v1", tags=["generation"], dependencies=[Depends(require_ready), Depends(require_json)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """The answer to a generation request, in one piece or as a stream."""

    call: Call
    body: GenerationBody
    writer: Writer
    prepare: Callable[[], Awaitable[Choices]]

    async def respond(self) -> Response:
        """Respond with JSON or a stream; a disconnect aborts the work within one step."""
        if not self.body.stream:
            return await self.call.respond(self._json)
        return EventStream(
            self._events(),
            late_headers=lambda: self.call.headers,
            on_error=self._describe_late,
            stall_seconds=self.call.services.settings.http.stall_timeout,
        )

    async def _json(self) -> bytes:
        choices = await collect(await self.prepare())
        return msgspec.json.encode(self.writer.answer(choices, self.call.usage))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Generate server-sent events."""
        body, call, writer = self.body, self.call, self.writer
        async with call:
            generation = await self.prepare()
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    # OpenAI: with include_usage, every chunk but the last has a usage of null.
                    usage = call.usage if body.continuous_usage else None if body.include_usage else UNSET
                    for chunk in writer.chunks(delta, generation.prompt_of(delta.index), usage):
                        yield event(chunk)
            if body.include_usage:
                yield event(writer.usage_chunk(call.usage))
        yield DONE

    def _describe_late(self, error: Exception) -> ErrorReply:
        """Describe and count an error after the response has begun."""
        reply = describe(error, request_id=self.call.request.state.request_id)
        self.call.services.metrics.count_error(reply.code)
        self.call.record.error = reply.code
        return reply


def _call(
    services: Services,
    request: Request,
    record: RequestRecord,
    body: GenerationBody,
    targets: Sequence[Target],
    texts: Sequence[str] | Sequence[list[int]],
    *,
    is_separate: bool = False,
) -> Call:
    """The call of a generation request; each member generates separate texts if ``is_separate``."""
    num_sequences = len(texts) * body.n * (len(targets) if is_separate else 1)
    return Call(
        services=services,
        request=request,
        record=record,
        targets=targets,
        texts=texts,
        text_field=body.text_field,
        num_sequences=num_sequences,
        members_per_sequence=1 if is_separate else len(targets),
        count_field="n" if body.n > 1 else "prompt",
        min_new_tokens=num_sequences * (1 if body.token_limit is None else body.token_limit),
        timeout=body.timeout,
        priority=body.priority,
        is_batch=is_batch_tier(body.service_tier),
        user=body.user,
    )


def _targets_of(services: Services, request: Request, body: MembersBody, faults: MemberFaults) -> list[Target]:
    base_name, access = services.base_name, caller_of(request).access
    if body.gives_each:
        return targets_of_each(body, base_name=base_name, access=access, faults=faults)
    return targets_of(body, base_name=base_name, access=access)


class _OncePerFormat:
    """Tokenises a request once for each format of its members."""

    def __init__(self, tokenize: Callable[[PromptFormat | None], Awaitable[list[list[int]]]]) -> None:
        self._tokenize = tokenize
        self._known: dict[PromptFormat | None, list[list[int]]] = {}

    async def __call__(self, prompt_format: PromptFormat | None) -> list[list[int]]:
        if prompt_format not in self._known:
            self._known[prompt_format] = await self._tokenize(prompt_format)
        return self._known[prompt_format]


async def tokenize_prompts(
    services: Services, prompts: list[str] | list[list[int]], *, add_special_tokens: bool, field: str = "prompt"
) -> list[list[int]]:
    """Tokenise the prompts that are given as text.

    Raises:
        ContextLengthError: If a text is far over the context; the request's ``field`` is named.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        most = services.engine.model.max_model_len
        return await services.tokenizer.encode(texts, add_special_tokens=add_special_tokens, most=most, field=field)
    return [prompt for prompt in prompts if not isinstance(prompt, str)]


async def tokenize_formatted(
    services: Services,
    prompt_format: PromptFormat,
    texts: list[str] | list[list[int]],
    add_special_tokens: bool | None,
    *,
    field: str,
) -> list[list[int]]:
    """Tokenise texts in a version's format; ``add_special_tokens`` of None is the format's own.

    Raises:
        InvalidRequestError: If there are token ids instead of texts, or a text cannot be formatted.
        ContextLengthError: If a text is far over the context.
    """
    prompts = await texts_in_format(services, prompt_format, texts, field=field)
    adds = prompts[0].add_special_tokens if add_special_tokens is None else add_special_tokens
    return await tokenize_prompts(services, [prompt.text for prompt in prompts], add_special_tokens=adds, field=field)


@router.post("/completions", response_class=Response)
@Operation(
    scopes={Scope.GENERATE},
    errors=(404, 429, 503),
    quota=Quota.TOKENS,
    work="text_completion",
    takes_token_ids=True,
    example={"model": "sentiment", "prompt": "The strap feels flimsy.", "max_tokens": 4, "temperature": 0},
    reply=Completion,
    event=Completion,
)
async def create_completion(body: CompletionBody, request: Request, services: ServicesDep) -> Response:
    """Complete one or more prompts, given as text or token ids."""
    record = begin_record(request, services, model=body.model_text, text=lambda: body.prompt)
    faults = MemberFaults(body.member_field, body.member_names)
    targets = _targets_of(services, request, body, faults)
    votes = body.is_ensemble and not body.gives_each and body.combine == "vote"
    call = _call(services, request, record, body, targets, body.prompt, is_separate=votes or body.gives_each)
    writer = CompletionWriter(
        body.model_text or services.base_name,
        with_token_ids=body.return_token_ids,
        with_steps=body.return_timings,
        num_top=body.num_top_logprobs,
        token_bytes=services.tokenizer.token_bytes,
    )

    async def in_format(prompt_format: PromptFormat | None) -> list[list[int]]:
        if prompt_format is None:
            adds = body.add_special_tokens is not False
            return await tokenize_prompts(services, body.prompt, add_special_tokens=adds)
        return await tokenize_formatted(services, prompt_format, body.prompt, body.add_special_tokens, field="prompt")

    def format_for(leased: Sequence[LeasedPair]) -> PromptFormat | None:
        return format_to_apply(leased, services.base_name) if body.apply_format else None

    async def tokenize() -> list[list[int]]:
        if body.apply_format:
            await call.lease()
        return await in_format(format_for(call.leased))

    async def choices() -> Choices:
        if body.gives_each:
            once = _OncePerFormat(in_format)
            return await prepare_each(
                call,
                body,
                lambda pair: once(format_for([pair])),
                faults,
                default_max_tokens=DEFAULT_COMPLETION_TOKENS,
            )
        (generation,) = await prepare(call, body, await tokenize(), default_max_tokens=DEFAULT_COMPLETION_TOKENS)
        return generation

    async def elected() -> bytes:
        return msgspec.json.encode(await vote(call, body, await tokenize(), writer))

    if votes:
        return await call.respond(elected)
    return await _Answer(call=call, body=body, writer=writer, prepare=choices).respond()


@router.post("/chat/completions", response_class=Response)
@Operation(
    scopes={Scope.GENERATE},
    errors=(404, 429, 503),
    quota=Quota.TOKENS,
    work="chat",
    example={"model": "dates", "messages": [{"role": "user", "content": "Born the 3rd of May 2021"}]},
    reply=ChatCompletion,
    event=ChatCompletionChunk,
)
async def create_chat_completion(body: ChatBody, request: Request, services: ServicesDep) -> Response:
    """Answer a conversation in the soft prompt's format; without one, by the model's chat template."""
    record = begin_record(
        request, services, model=body.model_text, text=lambda: [message.turn for message in body.messages]
    )
    faults = MemberFaults(body.member_field, body.member_names)
    targets = _targets_of(services, request, body, faults)
    texts = ["".join(message.content or "" for message in body.messages)]
    writer = ChatWriter(
        body.model_text or services.base_name if body.gives_each else targets[0].model,
        with_token_ids=body.return_token_ids,
        with_steps=body.return_timings,
        num_top=body.num_top_logprobs,
        token_bytes=services.tokenizer.token_bytes,
        make_reader=body.make_reader,
    )

    call = _call(services, request, record, body, targets, texts, is_separate=body.gives_each)

    async def in_format(prompt_format: PromptFormat | None) -> list[list[int]]:
        prompt = await text_of_conversation(
            services,
            prompt_format,
            body.messages,
            options=body,
            tools=body.shown_tools,
            # A forced call is valid even if the template does not show the tools to the model.
            needs_tools=body.constraint_field != "tools",
        )
        adds = prompt.add_special_tokens if body.add_special_tokens is None else body.add_special_tokens
        return await tokenize_prompts(services, [prompt.text], add_special_tokens=adds, field="messages")

    async def choices() -> Choices:
        if body.gives_each:
            once = _OncePerFormat(in_format)
            return await prepare_each(
                call, body, lambda pair: once(format_of(pair.versions)), faults, default_max_tokens=None
            )
        await call.lease()  # the version says how it is asked
        prompts = await in_format(format_of(call.leased[0].versions))
        (generation,) = await prepare(call, body, prompts, default_max_tokens=None)
        return generation

    return await _Answer(call=call, body=body, writer=writer, prepare=choices).respond()
