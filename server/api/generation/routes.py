"""OpenAI's routes: completions and chat completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec
from fastapi import APIRouter, Depends
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from server.api.errors import ErrorReply, describe
from server.api.generation.bodies import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, GenerationBody
from server.api.generation.call import Generation, admitted, shorter
from server.api.generation.voting import vote
from server.api.generation.writers import ChatWriter, ChoiceText, CompletionWriter, Writer
from server.api.http.disconnect import ClientDisconnected, unless_disconnected
from server.api.http.sse import DONE, EventStream, event
from server.api.inference.ensemble import targets_of
from server.api.inference.entry import Entry, entered
from server.api.inference.request_record import RequestRecord, begin_record
from server.api.inference.responses import ChatCompletion, ChatCompletionChunk, Completion
from server.api.inference.target import Target, resolve
from server.api.keys.callers import Scope, caller_of
from server.api.operations import Operation, Quota
from server.api.services import Services, ServicesDep, require_json, require_ready
from server.errors import InvalidRequestError

router = APIRouter(prefix="/v1", tags=["generation"], dependencies=[Depends(require_ready), Depends(require_json)])

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for the access log; the client has disconnected."""


SERVED_BY_HEADER = "x-prelude-prompt"
"""Response header with the version that answered, even if an alias has moved since."""


@dataclass(slots=True, kw_only=True)
class _Call:
    """One generation request; it holds no resources before ``admitted`` is entered."""

    services: Services
    body: GenerationBody
    targets: Sequence[Target]
    writer: Writer
    request: Request
    texts: Sequence[str] | Sequence[list[int]]
    field: str
    tokenize: Callable[[], Awaitable[list[list[int]]]]
    default_max_tokens: int | None
    arrival: float
    record: RequestRecord
    served_by: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response, once the request was admitted."""
        return {} if self.served_by is None else {SERVED_BY_HEADER: self.served_by}

    @contextmanager
    def entered(self, *, votes: bool = False) -> Iterator[Entry]:
        """Enter before any text is tokenised; with votes, each member generates a separate text."""
        body, num_texts = self.body, len(self.texts) * self.body.n
        least_new = 1 if body.token_limit is None else body.token_limit
        with entered(
            self.services,
            self.request,
            self.texts,
            field=self.field,
            count=num_texts * len(self.targets),
            count_field="n" if body.n > 1 else "prompt",
            num_members=len(self.targets),
            num_new_tokens=num_texts * least_new * (len(self.targets) if votes else 1),
            timeout=shorter(body.timeout, self.services.settings.http.max_wait_seconds),
            priority=body.priority,
        ) as entry:
            yield entry

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[Generation]:
        with self.entered() as entry:
            prompts = await self.tokenize()
            async with admitted(
                self.services,
                self.targets,
                self.body,
                prompts,
                default_max_tokens=self.default_max_tokens,
                entry=entry,
                arrival=self.arrival,
                record=self.record,
            ) as generation:
                yield generation

    async def answer(self) -> bytes:
        """Generate all of it; returns the JSON answer."""
        async with self.admitted() as generation:
            self.served_by = generation.served_by
            choices = [ChoiceText(generation.prompt_of(index)) for index in range(generation.num_choices)]
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    choices[delta.index].add(delta)
            return msgspec.json.encode(self.writer.answer(choices, generation.usage))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Generate it as server-sent events."""
        body, writer = self.body, self.writer
        async with self.admitted() as generation, aclosing(generation.deltas()) as deltas:
            self.served_by = generation.served_by
            async for delta in deltas:
                # OpenAI: with include_usage, every chunk but the last has a usage of null.
                usage = generation.usage if body.continuous_usage else None if body.include_usage else UNSET
                for chunk in writer.chunks(delta, generation.prompt_of(delta.index), usage):
                    yield event(chunk)
            if body.include_usage:
                yield event(writer.usage_chunk(generation.usage))
        yield DONE

    async def respond(self) -> Response:
        """Respond with JSON or a stream; a disconnect aborts the work within one step."""
        request = self.request
        if self.body.stream:
            return EventStream(
                self.events(),
                late_headers=lambda: self.headers,
                on_error=self._describe_late(request),
                stall_seconds=self.services.settings.http.stall_timeout,
            )
        try:
            answer = await unless_disconnected(request.receive, self.answer())
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(answer, headers=self.headers, media_type="application/json")

    def _describe_late(self, request: Request) -> Callable[[Exception], ErrorReply]:
        def describe_late(error: Exception) -> ErrorReply:
            reply = describe(error, request_id=request.state.request_id)
            self.services.metrics.count_error(reply.code)
            self.record.error = reply.code
            return reply

        return describe_late


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
    arrival = time.monotonic()

    async def tokenize() -> list[list[int]]:
        return await tokenize_prompts(services, body.prompt, add_special_tokens=body.add_special_tokens)

    record = begin_record(request, services, model=body.model_text, text=lambda: body.prompt)
    targets = targets_of(body, base_name=services.base_name, access=caller_of(request).access)
    writer = CompletionWriter(
        body.model_text or services.base_name,
        with_token_ids=body.return_token_ids,
        num_top=body.num_top_logprobs,
        token_bytes=services.tokenizer.token_bytes,
    )
    call = _Call(
        services=services,
        body=body,
        targets=targets,
        writer=writer,
        request=request,
        texts=body.prompt,
        field="prompt",
        tokenize=tokenize,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        arrival=arrival,
        record=record,
    )
    if body.is_ensemble and body.combine == "vote":

        async def answer() -> tuple[Completion, str]:
            with call.entered(votes=True) as entry:
                prompts = await tokenize()
                return await vote(
                    services, targets, body, prompts, writer=writer, entry=entry, arrival=arrival, record=record
                )

        try:
            completion, served_by = await unless_disconnected(request.receive, answer())
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        headers = {SERVED_BY_HEADER: served_by} if served_by else {}
        return Response(msgspec.json.encode(completion), headers=headers, media_type="application/json")
    return await call.respond()


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
    arrival = time.monotonic()
    if not services.tokenizer.has_chat_template:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions, or serve a chat model",
            param="messages",
        )

    async def tokenize() -> list[list[int]]:
        text = await services.tokenizer.render_chat(
            [message.turn for message in body.messages],
            tools=body.shown_tools,
            # A forced call is one whether the model knows of the tools or not.
            needs_tools=body.constraint_field != "tools",
            options=body.template_options,
        )
        return await tokenize_prompts(services, [text], add_special_tokens=body.add_special_tokens, field="messages")

    record = begin_record(
        request, services, model=body.model, text=lambda: [message.turn for message in body.messages]
    )
    target = resolve(body.model, body.prompt_id, base_name=services.base_name, access=caller_of(request).access)
    call = _Call(
        services=services,
        body=body,
        targets=[target],
        writer=ChatWriter(
            target.model,
            with_token_ids=body.return_token_ids,
            num_top=body.num_top_logprobs,
            token_bytes=services.tokenizer.token_bytes,
            make_reader=body.make_reader,
        ),
        request=request,
        texts=["".join(message.content or "" for message in body.messages)],
        field="messages",
        tokenize=tokenize,
        default_max_tokens=None,
        arrival=arrival,
        record=record,
    )
    return await call.respond()
