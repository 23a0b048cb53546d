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

from prompt_store.types import PromptKind
from server.api.admission import Permits
from server.api.http.disconnect import CLIENT_CLOSED_REQUEST, ClientDisconnected, unless_disconnected
from server.api.inference.ensemble import check_different
from server.api.inference.entry import allowance_of, check_entry
from server.api.inference.member_faults import FAULTS, MemberFaults
from server.api.inference.pair import LeasedPair, lease_pair
from server.api.inference.request_record import RequestRecord
from server.api.inference.responses import PromptTokensDetails, Timings, Usage
from server.api.inference.target import Target
from server.api.keys.callers import caller_of
from server.api.services import Services
from server.api.shadowing import Output, mean
from server.engine.types import FinishReason, GenerateRequest, TokenEvent
from server.errors import EngineNotReadyError, WaitTimeoutError
from server.fair_work import current_work
from server.metrics.metrics import Latencies

STICKY_HEADER = "x-prelude-sticky-key"
"""Request header: during a rollout, requests with the same key are answered by the same version."""

SERVED_BY_HEADER = "x-prelude-prompt"
"""Response header with the versions that answered, even if an alias has moved since."""


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
        is_batch: Whether it is of the service tier ``batch``, which has places and histograms of its own.
        user: Who the request is for, by its body; the header X-Prelude-Sticky-Key comes first.
        arrival: When the request arrived, by the monotonic clock.
        leased: The leased versions of each target, in order. Empty before ``lease``.
        outputs: The answer, to compare with a shadow's; None for the tokens of all sequences.
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
    is_batch: bool = False
    user: str | None = None
    arrival: float = field(default_factory=time.monotonic)
    leased: list[LeasedPair] = field(init=False, default_factory=list)
    outputs: list[Output] | None = field(init=False, default=None)
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
        admission, tenant = self.services.admission_of(is_batch=self.is_batch), self.tenant
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
        return self.timeout if self.is_batch else self.services.max_wait(self.timeout)

    @property
    def latencies(self) -> Latencies:
        """The histograms of the request's service tier."""
        return self.services.metrics.of_tier(is_batch=self.is_batch)

    @property
    def served_by(self) -> str | None:
        """``NAME@VERSION`` of what is leased, ``+`` in a pair and commas between members; None if there is none."""
        return ",".join(pair.name for pair in self.leased if pair.name) or None

    @property
    def shadow(self) -> str | None:
        """The model name of the version that gets a copy of the request, if any; an ensemble is not copied."""
        return self.leased[0].shadow if self.leased and len(self.targets) == 1 else None

    @property
    def adapter_names(self) -> set[str]:
        """The names of the leased adapters."""
        return {
            version.name for pair in self.leased for version in pair.versions if version.kind is PromptKind.ADAPTER
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response, once the soft prompts are leased."""
        return {SERVED_BY_HEADER: self.served_by} if self.served_by else {}

    @property
    def usage(self) -> Usage:
        """Tokens so far. Each member of an ensemble counts each text once, however many sequences continue it."""
        num_new = sum(sequence.num_new_tokens for sequence in self._sequences)
        num_cached = sum(sequence.num_cached_tokens for sequence in self._sequences if sequence.is_first_of_text)
        num_virtual = sum(pair.num_virtual_tokens for pair in self.leased) * len(self.texts)
        details = PromptTokensDetails(num_cached, num_virtual)
        return Usage(self._num_text_tokens, num_new, self._num_text_tokens + num_new, details)

    @property
    def outcome(self) -> str:
        """``abort`` until all sequences have finished; then ``error`` or ``length`` if one did so, else ``stop``."""
        reasons = [sequence.finish_reason for sequence in self._sequences]
        if len(reasons) < self.num_sequences or None in reasons:
            return "abort"
        return next((reason for reason in ("error", "length") if reason in reasons), "stop")

    async def lease(self, faults: MemberFaults | None = None) -> None:
        """Lease the versions that each target means now; once, however often it is called.

        Args:
            faults: Gets the errors of targets that cannot be leased, in place of the first being raised; ``leased``
                is then without them, and without those that have a fault already.

        Raises:
            NotFoundError: If a soft prompt or an adapter does not exist.
            InvalidRequestError: If two targets are the same, or a target's versions do not go together.
        """
        if self.leased:
            return
        key = self.request.headers.get(STICKY_HEADER, self.user)
        for index, target in enumerate(self.targets):
            if faults is not None and index in faults:
                continue
            try:
                self.leased.append(await lease_pair(self.services.store, target, self._stack, key))
            except FAULTS as error:
                if faults is None:
                    raise
                faults.add(index, error)
        if faults is None:
            check_different(self.targets, self.leased)
        elif not self.leased:
            return
        if len(self.leased) > 1:
            self.record.prompt = self.served_by
        else:
            self.record.served_by(self.leased[0].versions)

    def admit(
        self,
        texts: Sequence[Sequence[int]],
        *,
        num_new_tokens: int = 0,
        num_scored_tokens: int = 0,
        num_readers: int | None = None,
    ) -> None:
        """Reserve the request's maximum number of tokens. From here on it counts, and has an outcome.

        Args:
            texts: The tokens of each text.
            num_new_tokens: Maximum number of new tokens, of all sequences.
            num_scored_tokens: Tokens scored behind the texts; they count against limits but not in the usage.
            num_readers: Targets that read each text; None is all of them.

        Raises:
            RateLimitError: If the API key has too few tokens left; the tokenised tokens still count.
        """
        num_text_tokens = sum(map(len, texts)) * (len(self.targets) if num_readers is None else num_readers)
        allowance = allowance_of(self.request)
        allowance.reserve(num_text_tokens + num_new_tokens + num_scored_tokens, done=current_work().num_tokens)
        self._num_text_tokens, self._num_scored_tokens = num_text_tokens, num_scored_tokens
        for pair in self.leased:
            for version in pair.versions:
                self.services.usage.began(version)
                self._stack.callback(self.services.usage.ended, version)
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
        seconds = time.monotonic() - self.arrival if outcome in {"stop", "length"} else None
        if record.first_token_seconds is not None:
            record.decode_seconds = newest - self.arrival - record.first_token_seconds
        metrics.count_tenant(
            self.tenant, outcome, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens
        )
        for pair in self.leased:
            metrics.count_request(
                pair.label,
                outcome,
                version=pair.version_label,
                first_token_seconds=None if self.is_batch else record.first_token_seconds,
                seconds=None if self.is_batch else seconds,
            )
            for version in pair.versions:
                # Each member of an ensemble reads the texts, and takes part in every new token of its sequences.
                num_text = self._num_text_tokens // len(self.leased)
                num_new = sum(one.num_new_tokens for one in self._sequences if one.pair is None or one.pair is pair)
                self.services.usage.count(
                    version,
                    prompt_tokens=num_text,
                    completion_tokens=num_new,
                    is_error=is_failure,
                    seconds=None if self.is_batch else seconds,
                )
        if seconds is not None and self.shadow is not None and self.served_by is not None:
            outputs = self.outputs or [sequence.output for sequence in self._sequences]
            self.services.shadowing.copy(self.request, self.shadow, self.served_by, outputs)
        if seconds is not None:
            self.latencies.observe_request(seconds)

    def sequence(
        self, request: GenerateRequest, *, is_first_of_text: bool = True, pair: LeasedPair | None = None
    ) -> RunningSequence:
        """One of the ``num_sequences`` sequences; ``RunningSequence.events`` runs it.

        Args:
            request: What the engine runs.
            is_first_of_text: Whether its cached tokens count in the usage; False for further sequences of a text.
            pair: The only one of the targets that takes part; None if all do.
        """
        sequence = RunningSequence(self, request, is_first_of_text=is_first_of_text, pair=pair)
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
        pair: The only one of the request's targets that takes part; None if all do.
    """

    def __init__(
        self, call: Call, request: GenerateRequest, *, is_first_of_text: bool, pair: LeasedPair | None
    ) -> None:
        self.is_first_of_text = is_first_of_text
        self.pair = pair
        self.num_cached_tokens = 0
        self.num_new_tokens = 0
        self.newest_token_at = call.arrival
        self.finish_reason: str | None = None
        self._call = call
        self._request = request
        self._first_token_at: float | None = None
        self._is_copied = call.shadow is not None
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._queue_seconds: float | None = None
        self._prefill_seconds: float | None = None
        self._first_step: int | None = None
        self._last_step: int | None = None

    @property
    def output(self) -> Output:
        """Its answer, if the request is copied to a shadow."""
        return Output(tuple(self._token_ids), mean(self._logprobs))

    @property
    def timings(self) -> Timings:
        """Where its time went so far."""
        first = self._first_token_at
        return Timings(
            queue_seconds=self._queue_seconds,
            prefill_seconds=self._prefill_seconds,
            first_token_seconds=None if first is None else first - self._call.arrival,
            decode_seconds=0.0 if first is None else self.newest_token_at - first,
            first_step=self._first_step,
            last_step=self._last_step,
        )

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Run the sequence. Closing the generator early aborts it; the permits are released in any case.

        Raises:
            EngineError: If the sequence fails, or ends without a finish reason.
        """
        call, has_begun = self._call, False
        use, adapters = call.services.metrics.adapter_use, call.adapter_names
        use.wait(adapters)
        pairs = call.leased if self.pair is None else [self.pair]
        versions = [version for pair in pairs for version in pair.versions]
        call.services.names.begin(self._request.request_id, [pair.name for pair in pairs], versions)
        try:
            async with aclosing(call.services.engine.generate(self._request)) as events:
                async for event in events:
                    if not has_begun:
                        has_begun = True
                        call.permits.begin(call.members_per_sequence)
                        use.begin(adapters)
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
            use.end(adapters, has_begun=has_begun)
            call.services.names.end(self._request.request_id)

    def finish(self, reason: str) -> None:
        """Set the finish reason, ``stop`` or ``length``."""
        self.finish_reason = reason
        if self._first_token_at is not None:
            self._call.latencies.observe_decode(self.newest_token_at - self._first_token_at)

    def fail(self) -> None:
        """Note that it ended with an error."""
        self.finish_reason = "error"

    def _observe(self, event: TokenEvent) -> None:
        """Count the tokens and times of an event."""
        record, metrics, arrival = self._call.record, self._call.latencies, self._call.arrival
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
            self._queue_seconds, self._prefill_seconds = event.queue_seconds, event.prefill_seconds
        if not event.token_ids:
            return
        self._last_step = event.step
        if self._first_token_at is None:
            self._first_step = event.step
        if record.first_token_seconds is None:
            record.first_token_seconds = now - arrival
            metrics.observe_first_token(now - arrival)
        if self._first_token_at is None:
            self._first_token_at = now
        else:
            metrics.observe_inter_token(now - self.newest_token_at)
            self._call.services.load.between_tokens(now - self.newest_token_at)
        self.num_new_tokens += len(event.token_ids)
        if self._is_copied:
            self._token_ids += event.token_ids
            self._logprobs += [one.logprob for one in event.logprobs or ()]
        self.newest_token_at = now
