"""The engine's messages, served by vLLM: one task for each request, on one event loop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any
from uuid import uuid4

import torch
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import embeds_input, tokens_input
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from server.engine.messages import (
    AbortRequest,
    FromEngine,
    Inspect,
    InspectAdapter,
    Inspected,
    Pin,
    PinAdapter,
    StepOutputs,
    ToEngine,
    Unpin,
)
from server.engine.model.soft_prompts import SoftPromptLoadError
from server.engine.sampling.grammars import Matcher, TooManyGrammarsError
from server.engine.stats import EngineStats
from server.engine.types import (
    MAX_PRIORITY,
    AdapterSource,
    Capability,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    RequestFailure,
    SoftPromptSource,
    TokenEvent,
)
from server.engine.vllm.adapters.files import AdapterRefusedError, AdapterUnreadableError
from server.engine.vllm.adapters.lora import Lora
from server.engine.vllm.computing import Computations
from server.engine.vllm.constraints import ConstraintRefusedError, Constraints
from server.engine.vllm.sampling import logprobs_of, one_token, prompt_logprobs_of, vllm_params
from server.engine.vllm.use import Role, Use, source_with
from server.engine.vllm.waiting import Running, WaitsFor, count_waiting

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Computations of a soft prompt for one request: it may be evicted, or its computation may end, before it is used."""

QUIET_SECONDS = 0.5
"""Time between reports of steps that have no events."""

NOT_LOADED = "the soft prompt could not be loaded by vLLM's workers; see the engine's log"
NOT_FINITE_TEXT = "the model computed a value that is not finite for this text"


class EngineEndedError(Exception):
    """vLLM's own processes have ended."""


class _RefusedError(Exception):
    """A request cannot be served; the message says why."""


class Front:
    """Serves requests with an ``AsyncLLM``.

    Args:
        llm: vLLM's ``AsyncLLM``, or a fake.
        model: The loaded model.
        stats: The engine's state, which others update too.
        constraints: The matchers of constrained requests.
        lora: The adapters; None if the model's capabilities lack them.
        read: Reads a soft prompt's rows, in the serving dtype; it blocks, and raises SoftPromptLoadError.
        send: Sends a message.
    """

    def __init__(
        self,
        llm: Any,
        model: ModelInfo,
        *,
        stats: EngineStats,
        constraints: Constraints,
        lora: Lora | None,
        read: Callable[[SoftPromptSource], torch.Tensor],
        send: Callable[[FromEngine], None],
    ) -> None:
        self._llm = llm
        self._model = model
        self._stats = stats
        self._constraints = constraints
        self._lora = lora
        self._read = read
        self._send = send
        self._computations = Computations(self._compute)
        self._running: dict[str, Running] = {}
        self._num_queued = 0
        self._controls: set[asyncio.Task[None]] = set()
        self._pins: dict[str, SoftPromptSource] = {}
        self._events: list[TokenEvent] = []
        self._num_received = 0
        self._is_flushing = False
        self._flushed = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when vLLM's own processes have ended."""

    def receive(self, message: ToEngine) -> None:
        """Handle a message other than Start and Shutdown."""
        self._num_received += 1
        if isinstance(message, GenerateRequest):
            self._start(message)
        elif isinstance(message, AbortRequest):
            running = self._running.get(message.request_id)
            if running is not None:
                running.task.cancel()
        elif isinstance(message, Pin):
            self._pins[message.soft_prompt.identity] = message.soft_prompt
            self._control(self._pin(message.soft_prompt))
        elif isinstance(message, Unpin):
            if self._pins.pop(message.soft_prompt.identity, None) is not None:
                self._control(self._tell(Role.UNPIN, message.soft_prompt))
        elif isinstance(message, PinAdapter):
            self._control(self._warm(message.adapter))
        elif isinstance(message, Inspect | InspectAdapter):
            failure = RequestFailure(ErrorCode.REFUSED, self._model.refusal(Capability.INSPECTION))
            self._send(Inspected(message.inspection_id, failure))
        self._flush_soon()

    def stepped(self, started: Sequence[str], num_queued: int) -> None:
        """A step has ended, in which some requests were given blocks, and after which some are in vLLM's queue."""
        self._num_queued = num_queued
        for request_id in started:
            running = self._running.get(request_id)
            if running is not None:
                running.has_started = True
        if time.monotonic() - self._flushed > QUIET_SECONDS:
            self._flush_soon()

    async def close(self) -> None:
        """End all requests."""
        tasks = [running.task for running in self._running.values()] + list(self._controls)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._constraints.close()
        if self._lora is not None:
            self._lora.close()

    # Reporting

    def _emit(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._flush_soon()

    def _fail(self, request_id: str, code: ErrorCode, message: str) -> None:
        self._emit(TokenEvent(request_id=request_id, failure=RequestFailure(code, message)))

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            # The other tasks that a step has woken run before this.
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        self._flushed = time.monotonic()
        events, self._events = self._events, []
        has_work = bool(self._running or self._controls)
        stats = self._stats
        stats.num_waiting, stats.num_batch_waiting = count_waiting(self._running.values(), self._num_queued)
        self._send(StepOutputs(events=events, stats=stats, num_received=self._num_received, has_work=has_work))

    # Requests

    def _start(self, request: GenerateRequest) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            self._fail(request.request_id, ErrorCode.REFUSED, refusal)
            return
        self._stats.prompt_tokens += len(request.prompt_token_ids)
        if request.soft_prompt is not None:
            self._stats.virtual_tokens += request.soft_prompt.num_virtual_tokens
        task = asyncio.create_task(self._serve(request), name=f"request {request.request_id}")
        running = Running(task, time.monotonic(), request.is_batch)
        self._running[request.request_id] = running
        if request.timeout is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(request.timeout, self._expire, running)
            task.add_done_callback(lambda _: timer.cancel())

    def _expire(self, running: Running) -> None:
        if not running.has_started:
            running.is_late = True
            running.task.cancel()

    async def _serve(self, request: GenerateRequest) -> None:
        """Serve one request to its one last event."""
        request_id = request.request_id
        running = self._running[request_id]
        try:
            if request.adapter is not None:
                running.waits_for = WaitsFor.ADAPTER
            async with self._adapter(request.adapter) as lora:
                await self._generate(request, running, lora)
        except asyncio.CancelledError:
            if running.is_late:
                self._stats.num_timeouts += 1
                waited, reason = time.monotonic() - running.arrival, running.waits_for.value
                message = f"the request timed out after {waited:.1f} seconds {reason}; try again later"
                self._fail(request_id, ErrorCode.WAIT_TIMEOUT, message)
            else:
                self._emit(TokenEvent(request_id=request_id, finish_reason=FinishReason.ABORT))
        except (_RefusedError, AdapterRefusedError, VLLMClientError) as error:
            self._fail(request_id, ErrorCode.REFUSED, str(error))
        except ConstraintRefusedError as error:
            self._fail(request_id, error.failure.code, error.failure.message)
        except TooManyGrammarsError as error:
            self._fail(request_id, ErrorCode.WAIT_TIMEOUT, str(error))
        except (SoftPromptLoadError, AdapterUnreadableError) as error:
            self._fail(request_id, ErrorCode.FAILED, str(error))
        except (EngineEndedError, VllmDeadError):
            self._note_end()  # the process ends, and with it all requests
        except Exception as error:
            logger.exception("a request failed")
            self._fail(request_id, ErrorCode.FAILED, f"vLLM failed on this request ({type(error).__name__}: {error})")
        finally:
            del self._running[request_id]
            self._flush_soon()

    def _note_end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def _generate(self, request: GenerateRequest, running: Running, lora: Any) -> None:
        matcher = None
        constraint = request.params.constraint
        if constraint is not None:
            running.waits_for = WaitsFor.CONSTRAINT
            matcher = await self._constraints.matcher(constraint, request.salt)
        source = source_with(request.soft_prompt, request.adapter)
        for _ in range(MAX_ATTEMPTS):
            if source is not None and not source.is_key_values:
                running.waits_for = WaitsFor.SOFT_PROMPT
                await self._computations.ensure(source, lora)
            running.waits_for = WaitsFor.TURN
            if await self._stream(request, source, lora, matcher):
                return
            await self._explain(request, source)
        raise SoftPromptLoadError("the soft prompt was evicted from host memory again and again before its use")

    async def _explain(self, request: GenerateRequest, source: SoftPromptSource | None) -> None:
        """After vLLM has failed a request before its first token: raise the reason, or return to try again."""
        if source is None:
            if request.params.constraint is not None:
                failure = RequestFailure(ErrorCode.CONSTRAINT, "vLLM could not compile the constraint")
                raise ConstraintRefusedError(failure)
            raise SoftPromptLoadError("vLLM failed this request; see the engine's log")
        await asyncio.to_thread(self._read, source)
        if source.is_key_values:
            raise SoftPromptLoadError(NOT_LOADED)
        self._computations.forget(source.identity)

    async def _stream(
        self, request: GenerateRequest, source: SoftPromptSource | None, lora: Any, matcher: Matcher | None
    ) -> bool:
        """Pass on what vLLM generates; False if vLLM failed the request before its first token."""
        params, adapter = request.params, None if request.adapter is None else request.adapter.digest
        num_virtual = 0 if source is None else source.num_virtual_tokens
        # The text's own first token adds nothing to the set of tokens that a repetition penalty has seen.
        token_ids = request.prompt_token_ids[:1] * num_virtual + request.prompt_token_ids
        role = None if source is None else Role.LOAD
        use = Use(request_id=request.request_id, role=role, source=source, adapter=adapter)
        # vLLM has no logprobs of tokens whose keys and values it finds in its cache.
        salt = uuid4().hex if params.prompt_logprobs is not None else salt_of(request.salt, source, adapter)
        inputs = tokens_input(token_ids, cache_salt=salt)
        try:
            converted = vllm_params(params, use, self._model.eos_token_ids)
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        priority = request.priority + (2 * MAX_PRIORITY + 1 if request.is_batch else 0)
        outputs = self._llm.generate(inputs, converted, request.request_id, lora_request=lora, priority=priority)
        is_first = True
        async with aclosing(outputs):
            async for output in outputs:
                if output.outputs[0].finish_reason == "error":
                    if is_first:
                        return False
                    raise SoftPromptLoadError(NOT_LOADED)
                for event in self._events_of(request, output, matcher, is_first=is_first):
                    self._emit(event)
                    if event.finish_reason is not None or event.failure is not None:
                        return True
                is_first = False
        raise EngineEndedError

    def _events_of(
        self, request: GenerateRequest, output: Any, matcher: Matcher | None, *, is_first: bool
    ) -> Iterator[TokenEvent]:
        """The events of an output, one for each token: a text ends at the first token that ends it."""
        params, (completion,) = request.params, output.outputs
        new = list(completion.token_ids) if params.max_tokens > 0 else []
        event = self._first_event(request, output) if is_first else self._event(request, output)
        for index, token in enumerate(new):
            if event.failure is None:
                logprobs = None if completion.logprobs is None else completion.logprobs[index]
                self._append(event, request, token, logprobs, matcher)
            if index < len(new) - 1 or event.failure is not None or event.finish_reason is not None:
                yield event
                event = self._event(request, output)
        if params.max_tokens == 0:
            event.finish_reason = FinishReason.LENGTH
        elif completion.finish_reason is not None:
            event.finish_reason = FinishReason(completion.finish_reason)
        if event.failure is not None:
            event.finish_reason = None
        yield event

    def _event(self, request: GenerateRequest, output: Any) -> TokenEvent:
        num_virtual = 0 if request.soft_prompt is None else request.soft_prompt.num_virtual_tokens
        cached = max(0, (output.num_cached_tokens or 0) - num_virtual)
        return TokenEvent(request_id=request.request_id, num_cached_tokens=cached)

    def _first_event(self, request: GenerateRequest, output: Any) -> TokenEvent:
        """An event with what only the first one has, but no tokens."""
        event, params = self._event(request, output), request.params
        self._running[request.request_id].has_started = True
        metrics = output.metrics
        if metrics is not None and metrics.scheduled_ts:
            event.queue_seconds = max(0.0, metrics.scheduled_ts - metrics.queued_ts)
            event.prefill_seconds = max(0.0, metrics.first_token_ts - metrics.scheduled_ts)
        if params.prompt_logprobs is not None:
            event.prompt_logprobs = prompt_logprobs_of(
                output.prompt_logprobs or [],
                request.prompt_token_ids,
                start=params.prompt_logprobs_start,
                num_top=params.prompt_logprobs,
            )
            if any(entry is not None and math.isnan(entry.logprob) for entry in event.prompt_logprobs):
                event.failure = RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
        return event

    def _append(
        self,
        event: TokenEvent,
        request: GenerateRequest,
        token: int,
        logprobs: Mapping[int, Any] | None,
        matcher: Matcher | None,
    ) -> None:
        """Add a new token to an event, and end the text if it does."""
        if not 0 <= token < self._model.vocab_size:  # what sampling from NaN gives
            event.failure = RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
            return
        event.token_ids.append(token)
        self._stats.generation_tokens += 1
        if request.params.logprobs is not None and logprobs is not None:
            found = logprobs_of(logprobs, token, request.params.logprobs)
            event.logprobs = [found]
            if math.isnan(found.logprob):
                event.failure = RequestFailure(ErrorCode.NOT_FINITE, NOT_FINITE_TEXT)
                return
        if self._ends(request, token):
            event.stop_token_id, event.finish_reason = token, FinishReason.STOP
        if matcher is not None:
            matcher.advance(token)
            if event.finish_reason is None and matcher.error is not None:
                event.failure = RequestFailure(ErrorCode.CONSTRAINT, matcher.error)
            elif event.finish_reason is None and matcher.is_finished:
                event.finish_reason = FinishReason.STOP

    def _ends(self, request: GenerateRequest, token: int) -> bool:
        params = request.params
        is_end = token in self._model.eos_token_ids and (not params.ignore_eos or params.constraint is not None)
        return is_end or token in params.stop_token_ids

    def _refusal(self, request: GenerateRequest) -> str | None:
        """Why a request can never be served; None if it can."""
        params, source, model = request.params, request.soft_prompt, self._model
        if request.request_id in self._running:
            return f"request id {request.request_id!r} is in use"
        missing = model.missing(request)
        if missing is not None:
            return model.refusal(missing)
        if not request.prompt_token_ids:
            return "the text has no tokens"
        for ids in (request.prompt_token_ids, params.logit_bias, params.stop_token_ids):
            for token_id in (min(ids, default=0), max(ids, default=0)):
                if not 0 <= token_id < model.vocab_size:
                    return f"token id {token_id} is not in the vocabulary of {model.vocab_size} tokens"
        if params.prompt_logprobs_start < 0:
            return f"prompt_logprobs_start {params.prompt_logprobs_start} is before the text"
        num_virtual = 0 if source is None else source.num_virtual_tokens
        needed = num_virtual + len(request.prompt_token_ids) + max(params.max_tokens, 1)
        if needed > model.max_model_len:
            return f"the request needs {needed} positions; a sequence has at most {model.max_model_len}"
        return None

    # Soft prompts and adapters

    def _adapter(self, source: AdapterSource | None) -> AbstractAsyncContextManager[Any]:
        """Hold an adapter: vLLM's form of it, or None."""
        return nullcontext() if self._lora is None else self._lora.use(source)

    async def _warm(self, source: AdapterSource) -> None:
        """Load an adapter. vLLM can keep it only in a place for a running one, so it is not kept."""
        async with self._adapter(source):
            pass

    async def _compute(self, source: SoftPromptSource, lora: Any) -> None:
        """Let vLLM compute a soft prompt of embeddings; the connector keeps the result."""
        rows = await asyncio.to_thread(self._read, source)
        inputs = embeds_input(rows, cache_salt=f"compute:{source.identity}")
        await self._run(inputs, Role.COMPUTE, source, lora)

    async def _pin(self, source: SoftPromptSource) -> None:
        if not source.is_key_values:
            await self._computations.ensure(source)
        if source.identity in self._pins:
            await self._tell(Role.PIN, source)

    async def _tell(self, role: Role, source: SoftPromptSource) -> None:
        await self._run(tokens_input([0], cache_salt="control"), role, source)

    async def _run(self, inputs: Any, role: Role, source: SoftPromptSource, lora: Any = None) -> None:
        """Run a request for its effect on the connector."""
        request_id = f"{role.value}-{uuid4().hex}"
        params = one_token(Use(request_id=request_id, role=role, source=source))
        outputs = self._llm.generate(inputs, params, request_id, lora_request=lora)
        async with aclosing(outputs):
            async for output in outputs:
                if output.outputs[0].finish_reason == "error":
                    raise SoftPromptLoadError("vLLM could not compute the soft prompt; see the engine's log")

    def _control(self, work: Awaitable[None]) -> None:
        """Do something that nobody waits for."""

        async def run() -> None:
            try:
                await work
            except (EngineEndedError, VllmDeadError):
                self._note_end()
            except (SoftPromptLoadError, AdapterRefusedError, AdapterUnreadableError) as error:
                logger.warning("a pin failed: %s", error)
            except Exception:
                logger.exception("a pin failed")

        task = asyncio.create_task(run())
        self._controls.add(task)
        task.add_done_callback(self._end_control)

    def _end_control(self, task: asyncio.Task[None]) -> None:
        self._controls.discard(task)
        self._flush_soon()


def salt_of(tenant: str, source: SoftPromptSource | None, adapter: str | None) -> str:
    """What distinguishes cached blocks: no tenant finds another's, and no soft prompt or adapter another's text.

    Args:
        tenant: Whose request it is.
        source: The soft prompt.
        adapter: The adapter's digest.
    """
    parts = (tenant, "" if source is None else source.identity, adapter or "")
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
