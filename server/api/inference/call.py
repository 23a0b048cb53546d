"""The one life of a request for the model: check, permits, tokenisation, leases, admission, sequences, outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from starlette.requests import Request
from starlette.responses import Response

from prompt_store.errors import PromptNotFoundError
from prompt_store.types import LeasedPrompt
from server.api.admission import Permits
from server.api.http.disconnect import CLIENT_CLOSED_REQUEST, ClientDisconnected, unless_disconnected
from server.api.inference.ensemble import check_different, name_of
from server.api.inference.entry import allowance_of, check_entry
from server.api.inference.request_record import RequestRecord
from server.api.inference.responses import PromptTokensDetails, Usage
from server.api.inference.target import Target
from server.api.keys.callers import caller_of
from server.api.services import Services
from server.engine.types import FinishReason, GenerateRequest, TokenEvent
from server.errors import EngineNotReadyError, WaitTimeoutError
from server.fair_work import current_work

SERVED_BY_HEADER = "x-prelude-prompt"
"""Response header with the version that answered, even if an alias has moved since."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One request for the model, from the first check to its outcome.

    It is entered before any text is tokenised. Then ``lease``, ``admit`` and ``sequence`` are called in this order::

        async with call:                                # checks sizes and limits, takes the permits
            texts = await tokenize()
            await call.lease()                          # resolves the soft prompts to versions
            call.admit(texts, num_new_tokens=16)        # reserves tokens; from here on there is one outcome
            async for event in call.sequence(request).events():
                ...

    However the block ends, by a cancellation included, permits, leases and reserved tokens are released once; the
    outcome of an admitted request is recorded once, before them.

    Attributes:
        services: The server.
        request: The HTTP request.
        record: The request's log record.
        targets: What answers: one target, or each member of an ensemble.
        texts: The texts, or their tokens if the request has tokens.
        text_field: The request field that they are from.
        num_sequences: Sequences that the engine runs for the request.
        members_per_sequence: Members of an ensemble that each sequence combines; each takes a permit.
        count_field: The request field that sets the number of sequences.
        min_new_tokens: Minimum number of new tokens to expect, of all sequences.
        timeout: The request's timeout in the queue, in seconds; None if it sets none.
        priority: Lower is more urgent.
        arrival: When the request arrived, by the monotonic clock.
        leased: The leased version of each target, in order; None for the bare base. Empty before ``lease``.
    """

    services: Services
    request: Request
    record: RequestRecord
    targets: Sequence[Target]
    texts: Sequence[str] | Sequence[list[int]]
    text_field: str
    num_sequences: int
    members_per_sequence: int
    count_field: str
    min_new_tokens: int
    timeout: float | None
    priority: int
    arrival: float = field(default_factory=time.monotonic)
    leased: list[LeasedPrompt | None] = field(init=False, default_factory=list)
    permits: Permits = field(init=False)
    _stack: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)
    _sequences: list[RunningSequence] = field(init=False, default_factory=list)
    _num_text_tokens: int = field(init=False, default=0)
    _num_scored_tokens: int = field(init=False, default=0)

    async def __aenter__(self) -> Self:
        """Check the request and take its permits, before any work is done for it.

        Raises:
            ContextLengthError: If a text is longer than any that fits the context.
            PayloadTooLargeError: If all texts together are too long.
            RateLimitError: If the API key has too few tokens left.
            InvalidRequestError: If the request has more sequences than the server ever admits.
            OverloadedError: If the server is full.
            WaitTimeoutError: If the request would wait longer than its timeout.
        """
        admission, tenant = self.services.admission, self.tenant
        admission.check(tenant, self.max_wait, priority=self.priority)
        allowance = allowance_of(self.request)
        check_entry(
            self.services,
            allowance,
            self.texts,
            field=self.text_field,
            num_members=len(self.targets),
            min_new_tokens=self.min_new_tokens,
        )
        count = self.num_sequences * self.members_per_sequence
        self.permits = self._stack.enter_context(admission.permits(count, tenant=tenant, param=self.count_field))
        self._stack.callback(lambda: allowance.settle(current_work().num_tokens))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Record the outcome, and release everything."""
        await self._stack.__aexit__(kind, error, traceback)

    @property
    def tenant(self) -> str:
        """The tenant of the caller."""
        return caller_of(self.request).tenant

    @property
    def max_wait(self) -> float | None:
        """Seconds that each sequence may wait in the queue; None if there is no limit."""
        return self.services.max_wait(self.timeout)

    @property
    def served_by(self) -> str | None:
        """``NAME@VERSION`` of the leased soft prompts, with commas between; None if there is none."""
        return ",".join(name for leased in self.leased if (name := name_of(leased))) or None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response, once the soft prompts are leased."""
        return {SERVED_BY_HEADER: self.served_by} if self.served_by else {}

    @property
    def usage(self) -> Usage:
        """Tokens so far. Each member of an ensemble counts each text once, however many sequences continue it."""
        num_new = sum(sequence.num_new_tokens for sequence in self._sequences)
        num_cached = sum(sequence.num_cached_tokens for sequence in self._sequences if sequence.is_first_of_text)
        num_virtual = sum(leased.version.num_virtual_tokens for leased in self.leased if leased) * len(self.texts)
        details = PromptTokensDetails(num_cached, num_virtual)
        return Usage(self._num_text_tokens, num_new, self._num_text_tokens + num_new, details)

    @property
    def outcome(self) -> str:
        """``abort`` until all sequences have finished, then ``length`` if one was cut off, else ``stop``."""
        reasons = [sequence.finish_reason for sequence in self._sequences]
        if len(reasons) < self.num_sequences or None in reasons:
            return "abort"
        return "length" if "length" in reasons else "stop"

    async def lease(self) -> None:
        """Lease the version that each target means now.

        Raises:
            NotFoundError: If a soft prompt does not exist.
            InvalidRequestError: If two targets are the same version.
        """
        for target in self.targets:
            self.leased.append(await self._lease_one(target))
        check_different(self.targets, self.leased)
        if len(self.leased) > 1:
            self.record.prompt = self.served_by
        elif self.leased[0] is not None:
            version = self.leased[0].version
            self.record.prompt, self.record.version = version.name, version.version

    async def _lease_one(self, target: Target) -> LeasedPrompt | None:
        if target.ref is None:
            return None
        try:
            return await self._stack.enter_async_context(self.services.store.lease(target.ref, target.access))
        except PromptNotFoundError as error:
            raise target.not_found(error) from error

    def admit(self, texts: Sequence[Sequence[int]], *, num_new_tokens: int = 0, num_scored_tokens: int = 0) -> None:
        """Reserve the request's maximum number of tokens. From here on it counts, and has an outcome.

        Args:
            texts: The tokens of each text.
            num_new_tokens: Maximum number of new tokens, of all sequences.
            num_scored_tokens: Tokens scored behind the texts; they count against limits but not in the usage.

        Raises:
            RateLimitError: If the API key has too few tokens left; the tokenised tokens still count.
        """
        num_text_tokens = sum(map(len, texts)) * len(self.targets)
        allowance = allowance_of(self.request)
        allowance.reserve(num_text_tokens + num_new_tokens + num_scored_tokens, done=current_work().num_tokens)
        self._num_text_tokens, self._num_scored_tokens = num_text_tokens, num_scored_tokens
        self._stack.push(self._record_outcome)

    def _record_outcome(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        is_failure = error is not None and not isinstance(error, asyncio.CancelledError | GeneratorExit)
        outcome, usage = "error" if is_failure else self.outcome, self.usage
        record, metrics = self.record, self.services.metrics
        allowance_of(self.request).used += usage.total_tokens + self._num_scored_tokens
        record.end(outcome, usage)
        newest = max((sequence.newest_token_at for sequence in self._sequences), default=self.arrival)
        if record.first_token_seconds is not None:
            record.decode_seconds = newest - self.arrival - record.first_token_seconds
        for leased in self.leased:
            metrics.count_request(leased.version.name if leased else None, outcome)
        if outcome in {"stop", "length"}:
            metrics.observe_request(time.monotonic() - self.arrival)

    def sequence(self, request: GenerateRequest, *, is_first_of_text: bool = True) -> RunningSequence:
        """One of the ``num_sequences`` sequences; ``RunningSequence.events`` runs it.

        Args:
            request: What the engine runs.
            is_first_of_text: Whether its cached tokens count in the usage; False for further sequences of a text.
        """
        sequence = RunningSequence(self, request, is_first_of_text=is_first_of_text)
        self._sequences.append(sequence)
        return sequence

    async def respond(self, work: Callable[[], Awaitable[bytes]]) -> Response:
        """Enter the call, and respond with the JSON that ``work`` returns; a disconnect cancels it."""

        async def run() -> bytes:
            async with self:
                return await work()

        try:
            body = await unless_disconnected(self.request.receive, run())
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(body, headers=self.headers, media_type="application/json")


class RunningSequence:
    """One sequence of a request.

    Attributes:
        is_first_of_text: Whether its cached tokens count in the usage.
        num_cached_tokens: Text tokens found in the prefix cache.
        num_new_tokens: New tokens so far.
        newest_token_at: When the newest of them arrived, by the monotonic clock; the request's arrival before that.
        finish_reason: Why it finished; None before that.
    """

    def __init__(self, call: Call, request: GenerateRequest, *, is_first_of_text: bool) -> None:
        self.is_first_of_text = is_first_of_text
        self.num_cached_tokens = 0
        self.num_new_tokens = 0
        self.newest_token_at = call.arrival
        self.finish_reason: str | None = None
        self._call = call
        self._request = request
        self._first_token_at: float | None = None

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Run the sequence. Closing the generator early aborts it; the permits are released in any case.

        Raises:
            EngineError: If the sequence fails, or ends without a finish reason.
        """
        call, has_begun = self._call, False
        try:
            async with aclosing(call.services.engine.generate(self._request)) as events:
                async for event in events:
                    if not has_begun:
                        has_begun = True
                        call.permits.begin(call.members_per_sequence)
                    self._observe(event)
                    if event.finish_reason is FinishReason.ABORT:
                        raise EngineNotReadyError("the server is shutting down and ended the request")
                    yield event
                    if event.finish_reason is not None:
                        return
            raise EngineNotReadyError("the engine ended the request without a reason")
        except WaitTimeoutError as error:
            error.retry_after = call.permits.retry_after
            raise
        finally:
            call.permits.release(call.members_per_sequence, has_begun=has_begun)

    def finish(self, reason: str) -> None:
        """Set the finish reason, ``stop`` or ``length``."""
        self.finish_reason = reason
        if self._first_token_at is not None:
            self._call.services.metrics.observe_decode(self.newest_token_at - self._first_token_at)

    def _observe(self, event: TokenEvent) -> None:
        """Count the tokens and times of an event."""
        record, metrics, arrival = self._call.record, self._call.services.metrics, self._call.arrival
        self.num_cached_tokens = event.num_cached_tokens
        has_phases = event.queue_seconds is not None and event.prefill_seconds is not None
        if not (has_phases or event.token_ids):
            return
        now = time.monotonic()
        if record.first_output is None:
            record.first_output = now
            record.queue_seconds, record.prefill_seconds = event.queue_seconds, event.prefill_seconds
        if event.queue_seconds is not None and event.prefill_seconds is not None:
            metrics.observe_phases(event.queue_seconds, event.prefill_seconds)
        if not event.token_ids:
            return
        if record.first_token_seconds is None:
            record.first_token_seconds = now - arrival
            metrics.observe_first_token(now - arrival)
        if self._first_token_at is None:
            self._first_token_at = now
        else:
            metrics.observe_inter_token(now - self.newest_token_at)
        self.num_new_tokens += len(event.token_ids)
        self.newest_token_at = now
