"""The life of a generation request: validate, lease, admit, generate, and release everything exactly once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b

from prompt_store.types import LeasedPrompt, PromptVersion, TaskType
from server.api.admission import Permits
from server.api.generation.answer_text import AnswerText
from server.api.generation.bodies import MAX_ECHOED_LOGPROBS, GenerationBody
from server.api.generation.sampling_defaults import shorter_default, with_defaults
from server.api.inference.ensemble import leases_of, name_of
from server.api.inference.entry import Entry
from server.api.inference.logprobs import ScoredToken
from server.api.inference.request_record import RequestRecord
from server.api.inference.responses import PromptTokensDetails, Usage
from server.api.inference.target import Target
from server.api.inference.token_ids import check_token_ids
from server.api.services import Services
from server.api.soft_prompts.engine_source import check_task, soft_prompt_source
from server.engine.types import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from server.errors import (
    ConstraintError,
    ContextLengthError,
    EngineNotReadyError,
    InvalidRequestError,
    WaitTimeoutError,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """The new part of one choice.

    Attributes:
        index: Which choice.
        text: New text that is safe to show; may be empty.
        token_ids: New tokens, those included that show no text.
        finish_reason: ``stop`` or ``length`` in the choice's last delta, else None.
        scored: How likely each of ``token_ids`` was, after the prompt's tokens where they are echoed; None where it
            was not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    scored: list[ScoredToken] | None = None


class Generation:
    """One admitted request: a sequence for each of its choices, all with the same version of one soft prompt.

    Choice j of prompt i is sequence ``i * n + j``. With several soft prompts it is an ensemble of as many sequences,
    whose tokens come from the mean of their distributions.

    Attributes:
        prompts: Text tokens of each prompt.
        num_choices: Texts that are generated.
        num_virtual_tokens: Positions that the soft prompts take before each of them.
        leased: The soft prompts; None for the bare base.
        served_by: ``NAME@VERSION`` of the soft prompt, several with commas between, or None.
    """

    def __init__(
        self,
        services: Services,
        body: GenerationBody,
        prompts: list[list[int]],
        *,
        max_tokens: Sequence[int],
        leased: Sequence[LeasedPrompt | None],
        permits: Permits,
        tenant: str,
        arrival: float,
        record: RequestRecord,
    ) -> None:
        self.prompts = prompts
        self.num_choices = len(prompts) * body.n
        self.num_virtual_tokens = sum(map(_num_virtual_tokens, leased))
        self.leased = leased
        self.served_by = ",".join(name for own in leased if (name := name_of(own))) or None
        self._services = services
        self._body = body
        self._max_tokens = max_tokens
        self._soft_prompts = [soft_prompt_source(own, body.task_id) if own else None for own in leased]
        self._permits = permits
        self._tenant = tenant
        self._arrival = arrival
        self._id = uuid.uuid4().hex
        self._num_new = [0] * self.num_choices
        self._num_cached = [0] * self.num_choices
        self._finish_reasons: list[str | None] = [None] * self.num_choices
        self._first_tokens: dict[int, float] = {}
        self._seen_token = False
        self._newest = arrival
        self._record = record

    @property
    def outcome(self) -> str:
        """The outcome for the metrics: ``abort`` until all sequences have ended."""
        if None in self._finish_reasons:
            return "abort"
        return "length" if "length" in self._finish_reasons else "stop"

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once for each soft prompt, however many choices continue it."""
        num_prompt, num_new = sum(map(len, self.prompts)) * len(self.leased), sum(self._num_new)
        num_virtual = self.num_virtual_tokens * len(self.prompts)
        details = PromptTokensDetails(sum(self._num_cached[:: self._body.n]), num_virtual)
        return Usage(num_prompt, num_new, num_prompt + num_new, details)

    def end_record(self, outcome: str) -> None:
        """Complete the request's record."""
        record = self._record
        record.end(outcome, self.usage)
        if record.first_token_seconds is not None:
            record.decode_seconds = self._newest - self._arrival - record.first_token_seconds

    def prompt_of(self, index: int) -> list[int]:
        """The text tokens that a choice continues."""
        return self.prompts[index // self._body.n]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all sequences as they arrive. Closing it early aborts all running sequences.

        Raises:
            EngineError: If one sequence fails; the others are aborted.
        """
        if self.num_choices == 1:
            async with aclosing(self._sequence(0)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(self.num_choices)]
        try:
            num_running = len(tasks)
            while num_running:
                item = await queue.get()
                if item is None:
                    num_running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[Delta | Exception | None]) -> None:
        try:
            async with aclosing(self._sequence(index)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        except Exception as error:  # raised again by the reader of the queue
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async def _sequence(self, index: int) -> AsyncGenerator[Delta, None]:
        body = self._body
        said = AnswerText(self._services.tokenizer, body, self.prompt_of(index))
        detokenizer = said.detokenizer
        events = self._services.engine.generate(self._request(index))
        newest = self._arrival
        is_first, has_begun = True, False
        try:
            async with aclosing(events):
                async for event in events:
                    if not has_begun:
                        has_begun = True
                        self._permits.begin(len(self.leased))
                    newest = self._observe(index, event, newest)
                    if event.finish_reason is FinishReason.ABORT:
                        raise EngineNotReadyError("the server is shutting down and ended the request")
                    text_ids = event.token_ids
                    if event.stop_token_id is not None and not body.include_stop_str_in_output:
                        text_ids = text_ids[:-1]
                    text = detokenizer.append(text_ids)
                    reason = None if event.finish_reason is None else event.finish_reason.value
                    if reason is not None:
                        text += detokenizer.finish()
                    if detokenizer.stopped:
                        reason = FinishReason.STOP.value
                    scored: list[ScoredToken] | None = None if body.num_top_logprobs is None else []
                    if is_first and body.echoes:
                        echo, of_prompt = await said.echo(event.prompt_logprobs)
                        text = echo + text
                        if scored is not None:
                            scored += of_prompt
                    if scored is not None and event.logprobs is not None:
                        scored += said.scorer.append(event.token_ids, event.logprobs)
                    is_first = False
                    self._finish_reasons[index] = reason
                    if reason is not None and index in self._first_tokens:
                        self._services.metrics.observe_decode(newest - self._first_tokens[index])
                    yield Delta(index, text, event.token_ids, reason, scored)
                    if reason is not None:
                        return
            raise EngineNotReadyError("the engine ended the request without a reason")
        except ConstraintError as error:
            field = body.constraint_field
            raise ConstraintError(f"{field}: {error.message}", param=field) from error
        except WaitTimeoutError as error:
            error.retry_after = self._permits.retry_after
            raise
        finally:
            self._permits.release(len(self.leased), has_begun=has_begun)

    def _observe(self, index: int, event: TokenEvent, newest: float) -> float:
        """Count an event's tokens and time; returns when the sequence's newest token came."""
        self._num_cached[index] = event.num_cached_tokens
        if not event.token_ids:
            return newest
        now, metrics = time.monotonic(), self._services.metrics
        if not self._seen_token:
            self._seen_token = True
            metrics.observe_first_token(now - self._arrival)
            self._record.first_output = now
            self._record.first_token_seconds = now - self._arrival
            self._record.queue_seconds, self._record.prefill_seconds = event.queue_seconds, event.prefill_seconds
        if event.queue_seconds is not None and event.prefill_seconds is not None:
            metrics.observe_phases(event.queue_seconds, event.prefill_seconds)
        if self._num_new[index]:
            metrics.observe_inter_token(now - newest)
        else:
            self._first_tokens[index] = now
        self._num_new[index] += len(event.token_ids)
        self._newest = now
        return now

    def _request(self, index: int) -> GenerateRequest:
        body = self._body
        prompt, choice = divmod(index, body.n)
        params = SamplingParams(
            max_tokens=self._max_tokens[prompt],
            min_tokens=body.min_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=body.logit_bias,
            logprobs=body.num_top_logprobs,
            prompt_logprobs=body.num_top_logprobs if body.echoes else None,
            seed=_seed_of(body.seed, choice),
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            constraint=body.constraint,
        )
        soft_prompt, *others = self._soft_prompts
        return GenerateRequest(
            request_id=f"{self._id}-{index}",
            prompt_token_ids=self.prompts[prompt],
            params=params,
            soft_prompt=soft_prompt,
            others=tuple(others),
            salt=self._tenant,
            priority=body.priority,
            timeout=shorter(body.timeout, self._services.settings.http.max_wait_seconds),
        )


def _seed_of(seed: int | None, choice: int) -> int | None:
    """A seed per choice of a prompt; the first choice uses the request's seed."""
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}:{choice}".encode(), digest_size=7).digest(), "big")


@asynccontextmanager
async def admitted(
    services: Services,
    targets: Sequence[Target],
    body: GenerationBody,
    prompts: list[list[int]],
    *,
    default_max_tokens: int | None,
    entry: Entry,
    arrival: float,
    record: RequestRecord,
) -> AsyncIterator[Generation]:
    """Check an accepted request and lease its soft prompts; everything is released when the block ends.

    Args:
        services: The server.
        targets: What answers together; one, but for an ensemble.
        body: Its fields.
        prompts: Text tokens of each sequence.
        default_max_tokens: New tokens where the request sets no limit; None means the rest of the context.
        entry: Its places, and what it takes of its key's limits.
        arrival: When the request came, by the monotonic clock.
        record: The request's log record.

    Raises:
        InvalidRequestError: If the tokens are empty, not in the vocabulary or too long, the soft prompt
            is not for generation, or the task is not one of its tasks.
        NotFoundError: If there is no such soft prompt.
        InvalidRequestError: If two of an ensemble are the same, or it has more members than run at once.
        RateLimitError: If the caller's key does not have the tokens.
    """
    _check_tokens(prompts, body, vocab_size=services.engine.model.vocab_size)
    _check_echo(prompts, body)
    defaults = services.engine.model.generation_defaults
    async with AsyncExitStack() as stack:
        leased = await stack.enter_async_context(leases_of(services, targets))
        _begin_record(record, leased)
        for target, own in zip(targets, leased, strict=True):
            if own is not None:
                _check_generates(own.version, target)
            check_task(own.version if own else None, body.task_id)
        max_tokens = [
            _fit(
                len(prompt),
                num_virtual_tokens=max(map(_num_virtual_tokens, leased)),
                asked=body.token_limit,
                default=shorter_default(default_max_tokens, defaults),
                max_model_len=services.engine.model.max_model_len,
            )
            for prompt in prompts
        ]
        body = with_defaults(body, defaults, room=min(max_tokens))
        if body.min_tokens > min(max_tokens):
            raise InvalidRequestError(
                f"min_tokens: {body.min_tokens} is more than the maximum of {min(max_tokens)} new tokens",
                param="min_tokens",
            )
        most = services.settings.engine.max_num_seqs
        if len(leased) > most:
            param = targets[0].param
            raise InvalidRequestError(
                f"{param}: an ensemble of {len(leased)} is more than the {most} sequences that run at once here",
                param=param,
            )
        entry.reserve(sum(map(len, prompts)) * len(leased) + sum(max_tokens) * body.n)
        generation = Generation(
            services,
            body,
            prompts,
            max_tokens=max_tokens,
            leased=leased,
            permits=entry.permits,
            tenant=entry.caller.tenant,
            arrival=arrival,
            record=record,
        )
        outcome = "error"
        try:
            yield generation
            outcome = generation.outcome
        except (asyncio.CancelledError, GeneratorExit):
            outcome = generation.outcome
            raise
        finally:
            entry.allowance.used += generation.usage.total_tokens
            generation.end_record(outcome)
            for own in leased:
                services.metrics.count_request(own.version.name if own else None, outcome)
            if outcome in {"stop", "length"}:
                services.metrics.observe_request(time.monotonic() - arrival)


def _begin_record(record: RequestRecord, leased: Sequence[LeasedPrompt | None]) -> None:
    if len(leased) > 1:
        record.prompt = ",".join(name for own in leased if (name := name_of(own)))
    elif leased[0] is not None:
        record.prompt, record.version = leased[0].version.name, leased[0].version.version


def _num_virtual_tokens(leased: LeasedPrompt | None) -> int:
    return leased.version.num_virtual_tokens if leased else 0


def _check_tokens(prompts: list[list[int]], body: GenerationBody, *, vocab_size: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise InvalidRequestError(
                f"{body.text_field}: the text is empty; at least one token is required", param=body.text_field
            )
        check_token_ids(prompt, vocab_size=vocab_size, param=body.text_field)
    check_token_ids(body.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    check_token_ids(body.logit_bias, vocab_size=vocab_size, param="logit_bias")


def _check_echo(prompts: list[list[int]], body: GenerationBody) -> None:
    if body.echoes and body.num_top_logprobs is not None:
        count = sum(map(len, prompts)) * body.n * (1 + body.num_top_logprobs)
        if count > MAX_ECHOED_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs: echo would return {count} of them; the limit is {MAX_ECHOED_LOGPROBS}", param="logprobs"
            )


def _check_generates(version: PromptVersion, target: Target) -> None:
    if version.task_type != TaskType.CAUSAL_LM:
        raise InvalidRequestError(
            f"{target.param}: the soft prompt {version.name}@{version.version} was trained for {version.task_type}, "
            f"not for generation ({TaskType.CAUSAL_LM})",
            param=target.param,
        )


def shorter(asked: float | None, limit: float) -> float | None:
    """The shorter of the request's timeout and the server's limit (0: none); None means no limit."""
    return asked if not limit else limit if asked is None else min(asked, limit)


def _fit(
    num_text_tokens: int, *, num_virtual_tokens: int, asked: int | None, default: int | None, max_model_len: int
) -> int:
    """Maximum number of new tokens: the requested number, or the default limited by the context.

    Raises:
        ContextLengthError: If those asked for do not fit, or there is room for none.
    """
    room = max_model_len - num_virtual_tokens - num_text_tokens
    if asked is None and room >= 1:
        return room if default is None else min(default, room)
    if asked is not None and asked <= room:
        return asked
    wanted = "at least 1 new token" if asked is None else f"max_tokens of {asked}"
    raise ContextLengthError(
        f"the model's context is {max_model_len} tokens, and the request takes more: {num_virtual_tokens} virtual "
        f"tokens of the soft prompt, {num_text_tokens} text tokens and {wanted}",
        param="max_tokens" if room >= 1 else "prompt",
    )
