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

from server.api.errors import ErrorReply, describe
from server.api.generation.bodies import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, GenerationBody
from server.api.generation.generation import Generation, prepare
from server.api.generation.voting import vote
from server.api.generation.writers import ChatWriter, CompletionWriter, Writer, collect
from server.api.http.sse import DONE, EventStream, event
from server.api.inference.call import Call
from server.api.inference.ensemble import targets_of
from server.api.inference.request_record import RequestRecord, begin_record
from server.api.inference.responses import ChatCompletion, ChatCompletionChunk, Completion
from server.api.inference.target import Target, resolve
from server.api.keys.callers import Scope, caller_of
from server.api.operations import Operation, Quota
from server.api.services import Services, ServicesDep, require_json, require_ready
from server.errors import InvalidRequestError

router = APIRouter(prefix="/v1", tags=["generation"], dependencies=[Depends(require_ready), Depends(require_json)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """The answer to a generation request, in one piece or as a stream."""

    call: Call
    body: GenerationBody
    writer: Writer
    tokenize: Callable[[], Awaitable[list[list[int]]]]
    default_max_tokens: int | None

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

    async def _generation(self) -> Generation:
        prompts = await self.tokenize()
        (generation,) = await prepare(self.call, self.body, prompts, default_max_tokens=self.default_max_tokens)
        return generation

    async def _json(self) -> bytes:
        choices = await collect(await self._generation())
        return msgspec.json.encode(self.writer.answer(choices, self.call.usage))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Generate server-sent events."""
        body, call, writer = self.body, self.call, self.writer
        async with call:
            generation = await self._generation()
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
    votes: bool = False,
) -> Call:
    """The call of a generation request; with votes, each member generates a separate text."""
    num_sequences = len(texts) * body.n * (len(targets) if votes else 1)
    return Call(
        services=services,
        request=request,
        record=record,
        targets=targets,
        texts=texts,
        text_field=body.text_field,
        num_sequences=num_sequences,
        members_per_sequence=1 if votes else len(targets),
        count_field="n" if body.n > 1 else "prompt",
        min_new_tokens=num_sequences * (1 if body.token_limit is None else body.token_limit),
        timeout=body.timeout,
        priority=body.priority,
    )


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
    targets = targets_of(body, base_name=services.base_name, access=caller_of(request).access)
    votes = body.is_ensemble and body.combine == "vote"
    call = _call(services, request, record, body, targets, body.prompt, votes=votes)
    writer = CompletionWriter(
        body.model_text or services.base_name,
        with_token_ids=body.return_token_ids,
        num_top=body.num_top_logprobs,
        token_bytes=services.tokenizer.token_bytes,
    )

    async def tokenize() -> list[list[int]]:
        return await tokenize_prompts(services, body.prompt, add_special_tokens=body.add_special_tokens)

    async def elected() -> bytes:
        return msgspec.json.encode(await vote(call, body, await tokenize(), writer))

    if votes:
        return await call.respond(elected)
    answer = _Answer(
        call=call, body=body, writer=writer, tokenize=tokenize, default_max_tokens=DEFAULT_COMPLETION_TOKENS
    )
    return await answer.respond()


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
    """Answer a conversation formatted by the model's chat template."""
    if not services.tokenizer.has_chat_template:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions, or serve a chat model",
            param="messages",
        )
    record = begin_record(
        request, services, model=body.model, text=lambda: [message.turn for message in body.messages]
    )
    target = resolve(body.model, body.prompt_id, base_name=services.base_name, access=caller_of(request).access)
    texts = ["".join(message.content or "" for message in body.messages)]
    writer = ChatWriter(
        target.model,
        with_token_ids=body.return_token_ids,
        num_top=body.num_top_logprobs,
        token_bytes=services.tokenizer.token_bytes,
        make_reader=body.make_reader,
    )

    async def tokenize() -> list[list[int]]:
        text = await services.tokenizer.render_chat(
            [message.turn for message in body.messages],
            tools=body.shown_tools,
            # A forced call is valid even if the template does not show the tools to the model.
            needs_tools=body.constraint_field != "tools",
            options=body.template_options,
        )
        return await tokenize_prompts(services, [text], add_special_tokens=body.add_special_tokens, field="messages")

    answer = _Answer(
        call=_call(services, request, record, body, [target], texts),
        body=body,
        writer=writer,
        tokenize=tokenize,
        default_max_tokens=None,
    )
    return await answer.respond()
