"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from itertools import chain

from server.config import EngineSettings
from server.engine.adapters.host_cache import HostCache
from server.engine.adapters.loader import AdapterLoader
from server.engine.device_faults import raise_if_device_failed
from server.engine.failures import fail, failure_event, named, reason, refusal_of
from server.engine.messages import (
    BatchPicture,
    Inspect,
    InspectAdapter,
    Inspected,
    Pin,
    PinAdapter,
    Stage,
    Unpin,
    UnpinAdapter,
)
from server.engine.model.block_loads import BlockLoads
from server.engine.model.inspection import Inspector
from server.engine.model.model_runner import ModelRunner
from server.engine.model.platform import Platform
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.sampling.grammars import GrammarCompiler, TooManyGrammarsError, load_tokenizer
from server.engine.sampling.next_token import NOT_FINITE_TEXT, take_token
from server.engine.scheduling.batch_picture import take_picture
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.pending import PendingSequences
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.step_parts import retry_in_parts
from server.engine.stats import EngineStats
from server.engine.step_stats import record_state, record_step
from server.engine.types import ErrorCode, FinishReason, GenerateRequest, Logprobs, ModelInfo, StepOutput, TokenEvent
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

NOT_FINITE_SOFT_PROMPT = "the model computed a value that is not finite for the soft prompt before this text"


class LLMEngine:
    """Continues many texts at once, one token of each per step.

    Not thread-safe: one thread adds, aborts and steps.

    Args:
        settings: The model and its limits.
        on_loaded: Called when a soft prompt has been read or copied, a grammar compiled, or the device has failed,
            mostly from another thread, to wake a sleeping loop.
        platform: The device; None chooses it from the settings.
        on_stage: Called at the beginning of each stage of the start.

    Attributes:
        overlaps_host: Whether the device computes a step while the host does other work.

    Raises:
        EngineStartError: If the model cannot be served with these settings.
    """

    def __init__(
        self,
        settings: EngineSettings,
        on_loaded: Callable[[], None] = lambda: None,
        platform: Platform | None = None,
        on_stage: Callable[[Stage], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        try:
            self.runner = ModelRunner(settings, platform, on_stage)
        except EngineStartError:
            raise
        except Exception as error:  # an untested model may raise anything; report the reason without a traceback
            logger.debug("the model cannot be started", exc_info=error)
            raise EngineStartError(
                f"the model {settings.model!r} cannot be served ({type(error).__name__}: {error})"
            ) from error
        self.overlaps_host = self.runner.platform.overlaps_host
        self._loads = BlockLoads(self.runner.cache, self.runner.platform.copy_stream(), on_loaded)
        self._waits_for_load = False
        self._host_adapters: HostCache | None = None
        self.adapters = self.runner.adapters = self._make_adapter_loader(on_loaded)
        try:
            self.scheduler = self._make_scheduler()
        except ValueError as error:
            raise EngineStartError(str(error)) from error
        spec = self.runner.cache_spec
        self.soft_prompts = SoftPromptLoader(
            embedding_width=self.model.embedding_width,
            key_values_width=2 * spec.num_layers * spec.num_kv_heads * spec.head_dim,
            head_width=self.model.hidden_size or self.model.embedding_width,
            dtype=self.runner.dtype,
            budget_bytes=settings.soft_prompt_host_bytes,
            on_loaded=on_loaded,
        )
        self._inspector = Inspector(self.runner, self.soft_prompts.read, on_device_error=on_loaded)
        self._grammars = GrammarCompiler(
            lambda: load_tokenizer(settings.model, settings.revision),
            vocab_size=self.model.vocab_size,
            eos_token_ids=self.model.eos_token_ids,
            on_compiled=on_loaded,
        )
        self._pending = PendingSequences()
        self._stats = EngineStats(num_blocks=self.model.num_blocks, block_size=self.model.block_size)

    @property
    def model(self) -> ModelInfo:
        """The resident model."""
        return self.runner.info

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do now. Sequences that wait for a soft prompt or a grammar do not count."""
        return self.scheduler.has_work and not self._waits_for_load

    @property
    def is_loading(self) -> bool:
        """Whether something is loaded beside the steps: if nothing hangs, there will be a step."""
        return len(self._loads) > 0 or self.scheduler.adapters.is_reading

    @property
    def idle_seconds(self) -> float | None:
        """Seconds until a step must end a sequence that waits; None if there is none with a deadline."""
        deadlines = [self._pending.next_deadline]
        if self._waits_for_load:
            deadlines.append(self.scheduler.next_deadline)
        deadline = min((one for one in deadlines if one is not None), default=None)
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def num_unfinished(self) -> int:
        """Sequences that have not ended; an ensemble counts once."""
        return self.scheduler.num_sequences + len(self._pending)

    def add(self, request: GenerateRequest) -> list[TokenEvent]:
        """Admit a sequence; returns its only event if it is refused."""
        try:
            seq = Sequence(request, arrival=time.monotonic())
        except ValueError as error:
            return [failure_event(request.request_id, ErrorCode.REFUSED, str(error))]
        refusal = self._refusal_of(seq)
        if refusal is not None:
            return [fail(seq, ErrorCode.REFUSED, refusal)]
        needs: list[Hashable] = []
        for member in seq.members:
            self._stats.prompt_tokens += member.num_prompt_tokens
            self._stats.virtual_tokens += member.num_virtual_tokens
            soft_prompt = member.request.soft_prompt
            if soft_prompt is not None and not self.soft_prompts.acquire(soft_prompt):
                needs.append(soft_prompt.identity)
        if request.params.constraint is not None:
            try:
                seq.matcher = self._grammars.matcher(request.params.constraint, request.salt)
            except TooManyGrammarsError as error:
                self._release_soft_prompts(seq)
                return [fail(seq, ErrorCode.WAIT_TIMEOUT, str(error))]
            if seq.matcher is None:
                needs.append(request.params.constraint)
        if needs:
            self._pending.add(seq, needs)
            return []
        return self._schedule(seq)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a sequence; returns its last event, or nothing if it had ended already."""
        seq = self.scheduler.abort(request_id)
        if seq is None:
            seq = self._pending.remove(request_id)
        if seq is None:
            return []
        self._release_soft_prompts(seq)
        self._abandon_grammar(seq)
        self._waits_for_load = False
        return [
            TokenEvent(
                request_id=request_id, finish_reason=FinishReason.ABORT, num_cached_tokens=seq.num_cached_tokens
            )
        ]

    def pin(self, message: Pin | Unpin | PinAdapter | UnpinAdapter) -> None:
        """Pin a soft prompt's rows or an adapter in host memory, or unpin them."""
        if isinstance(message, Pin):
            self.soft_prompts.pin(message.soft_prompt)
        elif isinstance(message, Unpin):
            self.soft_prompts.unpin(message.soft_prompt)
        elif self.adapters is not None and isinstance(message, PinAdapter):
            self.adapters.pin(message.adapter)
        elif self.adapters is not None:
            self.adapters.unpin(message.adapter)

    def inspect(self, message: Inspect | InspectAdapter, on_inspected: Callable[[Inspected], None]) -> None:
        """Compare a soft prompt or an adapter with the model in another thread, which calls ``on_inspected`` once.

        If the device fails, the next step raises instead.
        """
        self._inspector.inspect(message, on_inspected)

    def take_loaded(self) -> list[TokenEvent]:
        """Schedule the sequences that need nothing more; returns the last events of those whose need failed.

        Raises:
            DeviceError: If a soft prompt could not be copied because the device failed.
        """
        events: list[TokenEvent] = []
        loaded = self.soft_prompts.take_loaded()
        unreadable = {identity for identity, error in loaded if error is not None}
        for identity, error in loaded:
            if error is not None:
                for seq in self._pending.waiting_for(identity):
                    self._pending.remove(seq.request_id)
                    self._release_soft_prompts(seq, unreadable)
                    self._abandon_grammar(seq)
                    events.append(fail(seq, ErrorCode.FAILED, error))
            events += self._admit_pending(identity)
        for constraint, failure in self._grammars.take_compiled():
            for seq in self._pending.waiting_for(constraint):
                if failure is None:
                    seq.matcher = self._grammars.matcher(constraint, seq.request.salt)
                else:
                    self._pending.remove(seq.request_id)
                    self._release_soft_prompts(seq)
                    events.append(fail(seq, failure.code, failure.message))
            events += self._admit_pending(constraint)
        return events + self._end_reads() + self._end_loads()

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[TokenEvent]:
        """Compute one token for every sequence that is ready; returns the new events.

        Args:
            meanwhile: Called once: after a step that is replayed has been queued, but before any other step is
                queued, because that takes the host long. Not called if a replayed step cannot be queued.

        Raises:
            DeviceError: If the device failed; the engine cannot be used again.
        """
        if self._inspector.device_error is not None:
            raise self._inspector.device_error
        started = time.monotonic()
        events = self.take_loaded() + self._expire(started)
        plan = self.scheduler.schedule(started)
        self._loads.start(plan, self.soft_prompts)
        self._waits_for_load = plan.is_empty and self.is_loading
        if plan.is_empty:
            meanwhile()
            return events
        computed = plan
        try:
            output = self._run(plan, meanwhile)
        except Exception as error:
            computed, output, failed = self._recover(plan, error)
            events += failed
        events += self._postprocess(computed, output)
        record_step(self._stats, plan, time.monotonic() - started)
        return events

    @property
    def stats(self) -> EngineStats:
        """The current state."""
        stats = self._stats
        record_state(stats, self.scheduler, block_bytes=self.runner.cache_spec.block_bytes)
        stats.num_waiting += len(self._pending)
        stats.host = self.soft_prompts.stats
        if self._host_adapters is not None:
            stats.adapters = self._host_adapters.stats
        if self.adapters is not None and self.runner.platform.has_own_memory:
            stats.device_adapters = self.adapters.stats
        elif self.adapters is not None:
            stats.adapters = self.adapters.stats
        return stats

    def picture(self) -> BatchPicture:
        """The sequences, soft prompts and blocks between two steps."""
        adapters = self._host_adapters or self.adapters
        host = chain(self.soft_prompts.digests, () if adapters is None else adapters.digests)
        return take_picture(self.scheduler, self._pending, step=self._stats.steps, now=time.monotonic(), host=host)

    def close(self) -> None:
        """End the other threads and release the model."""
        self._grammars.close()
        self._inspector.close()
        self.soft_prompts.close()
        if self.adapters is not None:
            self.adapters.close()
        self._loads.close()
        self.runner.close()

    def _make_scheduler(self) -> Scheduler:
        blocks = BlockManager(
            self.model.num_blocks,
            self.model.block_size,
            enable_prefix_caching=self._settings.enable_prefix_caching,
        )
        return Scheduler(
            blocks,
            max_num_seqs=self._settings.max_num_seqs,
            max_num_batched_tokens=self._settings.max_num_batched_tokens,
            max_model_len=self.model.max_model_len,
            batch_step_tokens=min(self.runner.platform.batch_step_tokens, self._settings.max_num_batched_tokens),
            step_fill_tokens=self._loads.step_fill_tokens,
            adapter_memory=None if self.adapters is None else self.adapters.memory,
        )

    def _make_adapter_loader(self, on_loaded: Callable[[], None]) -> AdapterLoader | None:
        reader = self.runner.adapter_reader
        if reader is None:
            return None
        read, budget_bytes = reader.read, self._settings.adapter_host_bytes
        if self.runner.platform.has_own_memory:
            self._host_adapters = HostCache(reader.pack, reader.place, budget_bytes=budget_bytes)
            read, budget_bytes = self._host_adapters.read, self._settings.adapter_device_bytes
        return AdapterLoader(
            read,
            bytes_per_parameter=self.runner.dtype.itemsize,
            budget_bytes=budget_bytes,
            held_bytes=self.runner.held_adapter_bytes,
            on_loaded=on_loaded,
        )

    def _refusal_of(self, seq: Sequence) -> str | None:
        """Why the engine can never serve a sequence; None if it can."""
        try:
            self.scheduler.check(seq)
        except ValueError as error:
            return str(error)
        if seq.request_id in self._pending:
            return f"request id {seq.request_id!r} is in use"
        return refusal_of(seq, self.model, scores_prompts=self.runner.scores_prompts)

    def _run(self, plan: StepPlan, meanwhile: Callable[[], None]) -> StepOutput:
        """Compute a step, and plan the decodes of the next one while the device computes."""
        is_replayed = self.runner.replays(plan.chunks)
        if not is_replayed:
            meanwhile()
        output = self.runner.launch(plan, self.soft_prompts)
        if is_replayed:
            meanwhile()
        if self.overlaps_host:
            self.scheduler.plan_ahead()
        return output()

    def _end_reads(self) -> list[TokenEvent]:
        """End the waiting sequences whose adapter could not be read, or never fits; returns their last events."""
        events: list[TokenEvent] = []
        for identity, failure in [] if self.adapters is None else self.adapters.take_loaded():
            for seq in self.scheduler.adapters.users(identity):
                refusal = self.scheduler.adapters.refusal_of(seq)
                if failure is not None:
                    events.append(self._finish_failed(seq, failure.code, failure.message))
                elif refusal is not None:
                    events.append(self._finish_failed(seq, ErrorCode.REFUSED, refusal))
        return events

    def _end_loads(self) -> list[TokenEvent]:
        """Let the sequences of ended loads start; returns the last events of those whose load failed."""
        events: list[TokenEvent] = []
        for waiting, error in self._loads.end(self.scheduler):
            raise_if_device_failed(error, self.runner.platform.check_device)
            logger.error("a soft prompt cannot be copied to the device", exc_info=error)
            message = f"the soft prompt cannot be copied to the device ({named(error)})"
            # A member of an ensemble may have ended it already.
            events += [
                self._finish_failed(seq, ErrorCode.FAILED, message) for seq in waiting if seq.end_reason is None
            ]
        return events

    def _recover(self, plan: StepPlan, error: Exception) -> tuple[StepPlan, StepOutput, list[TokenEvent]]:
        """End the sequences that made a step raise, and compute the others.

        Returns:
            The part of the plan that was computed, its output, and the last events of the sequences that failed.

        Raises:
            DeviceError: If the device failed.
        """
        raise_if_device_failed(error, self.runner.platform.check_device)
        logger.error("a step failed; computing its parts one by one", exc_info=error)
        retry = retry_in_parts(
            plan,
            self.scheduler.running,
            lambda part: self.runner.launch(part, self.soft_prompts)(),
            error,
            block_size=self.scheduler.block_manager.block_size,
            on_error=lambda cause: raise_if_device_failed(cause, self.runner.platform.check_device),
        )
        self.scheduler.undo(retry.undone)
        failed = []
        for part, cause in retry.failed:
            of_part = [part.owner] if isinstance(part.owner, Sequence) else self.scheduler.holders(part.owner)
            failed += [
                self._finish_failed(seq, ErrorCode.FAILED, reason(cause)) for seq in of_part if seq.end_reason is None
            ]
        preempted = [seq for seq in retry.unserved if seq.end_reason is None]
        for seq in preempted:
            self.scheduler.preempt(seq)
        logger.warning("%d sequences failed, %d are recomputed", len(failed), len(preempted))
        return retry.plan, retry.output, failed

    def _postprocess(self, plan: StepPlan, step: StepOutput) -> list[TokenEvent]:
        events = self._end_spoiled(plan, step.spoiled)
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.seq.block_table and chunk.seq.request_id in step.prompt_logprobs:
                chunk.seq.prompt_logprobs += step.prompt_logprobs[chunk.seq.request_id]
        sampled = [seq for chunk in plan.chunks if (seq := chunk.seq) and chunk.samples and not seq.is_follower]
        logprobs = step.logprobs or [None] * len(sampled)
        for seq, token, own in zip(sampled, step.tokens, logprobs, strict=True):
            if not seq.block_table:  # it has ended, or it was preempted because it read spoiled blocks
                continue
            try:
                events.append(self._advance(seq, token, own, step.class_logits.get(seq.request_id)))
            except Exception as error:  # for example in its grammar; no other sequence is affected
                logger.exception("a sequence failed after its step")
                events.append(self._finish_failed(seq, ErrorCode.FAILED, reason(error)))
        return events

    def _end_spoiled(self, plan: StepPlan, spoiled: Mapping[int, int]) -> list[TokenEvent]:
        """End the sequences that wrote non-finite keys and values, before other sequences can find those blocks."""
        if not spoiled:
            return []
        ended, holding = self.scheduler.spoil(plan, spoiled)
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.samples and not chunk.seq.block_table:
                chunk.seq.keep_draw()
        return [
            self._finish_failed(seq, ErrorCode.NOT_FINITE, message)
            for seqs, message in ((ended, NOT_FINITE_TEXT), (holding, NOT_FINITE_SOFT_PROMPT))
            for seq in seqs
        ]

    def _advance(
        self, seq: Sequence, token: int, logprobs: Logprobs | None, class_logits: list[float] | None
    ) -> TokenEvent:
        """Append the next token to a sequence, and end the sequence if the token is its last."""
        event = take_token(seq, token, logprobs, class_logits, eos_token_ids=self.model.eos_token_ids)
        event.step = self._stats.steps + 1
        self._stats.generation_tokens += len(event.token_ids)
        if event.failure is not None:
            constraint = seq.request.params.constraint
            if constraint is not None and seq.matcher is not None and seq.matcher.error is not None:
                self._grammars.forget(constraint)
            return self._finish_failed(seq, event.failure.code, event.failure.message)
        if event.finish_reason is not None:
            self._finish(seq, event.finish_reason)
        return event

    def _finish(self, seq: Sequence, reason: FinishReason | ErrorCode) -> None:
        self.scheduler.finish(seq, reason)
        self._release_soft_prompts(seq)

    def _finish_failed(self, seq: Sequence, code: ErrorCode, message: str) -> TokenEvent:
        """End a scheduled sequence, unless it has ended already, and return its last event."""
        if seq.end_reason is None:
            self._finish(seq, code)
        return failure_event(seq.request_id, code, message)

    def _release_soft_prompts(self, seq: Sequence, unreadable: Collection[str] = ()) -> None:
        """Release the soft prompts of all members, except unreadable ones: the loader has dropped those already."""
        for member in seq.members:
            soft_prompt = member.request.soft_prompt
            if soft_prompt is not None and soft_prompt.identity not in unreadable:
                self.soft_prompts.release(soft_prompt)

    def _abandon_grammar(self, seq: Sequence) -> None:
        """Stop compiling a grammar if only this sequence waited for it."""
        constraint = seq.request.params.constraint
        if constraint is not None and seq.matcher is None and not self._pending.waiting_for(constraint):
            self._grammars.abandon(constraint)

    def _expire(self, now: float) -> list[TokenEvent]:
        """End the sequences that have not started to run by their deadline."""
        late = self.scheduler.expire(now)
        late += self._pending.expire(now)
        events = []
        for seq in late:
            self._release_soft_prompts(seq)
            self._abandon_grammar(seq)
            self._stats.num_timeouts += 1
            message = f"the request timed out after {now - seq.arrival:.1f} seconds in the queue; try again later"
            events.append(fail(seq, ErrorCode.WAIT_TIMEOUT, message))
        return events

    def _admit_pending(self, need: Hashable) -> list[TokenEvent]:
        return [event for seq in self._pending.supply(need) for event in self._schedule(seq)]

    def _schedule(self, seq: Sequence) -> list[TokenEvent]:
        """Schedule a sequence; returns its last event if its adapters were found to be too large meanwhile."""
        try:
            self.scheduler.add(seq)
        except ValueError as error:
            self._release_soft_prompts(seq)
            return [fail(seq, ErrorCode.REFUSED, str(error))]
        self._waits_for_load = False
        return []
