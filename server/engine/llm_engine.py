"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from math import isfinite

from server.config import EngineSettings
from server.engine.device_faults import is_device_fault
from server.engine.messages import AddRequest, Inspect, Inspected, Pin, Unpin
from server.engine.model.inspection import Inspector
from server.engine.model.model_runner import ModelRunner
from server.engine.model.platform import Platform
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.sampling.grammar_check import NO_WAY_ON
from server.engine.sampling.grammars import TOO_MANY_SLOW, GrammarCompiler, TooManyGrammarsError, load_tokenizer
from server.engine.sampling.sampler import NO_TOKEN, NOT_FINITE
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.pending import PendingSequences
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.step_parts import retry_in_parts
from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
)
from server.engine.types import EngineStats, FinishReason, Logprobs, ModelInfo, StepOutput, TokenOutput
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

NOT_FINITE_TEXT = "the model computed a value that is not finite for this text"
NOT_FINITE_SOFT_PROMPT = "the model computed a value that is not finite for the soft prompt before this text"


class LLMEngine:
    """Continues many texts at once, one token of each a step.

    Not thread-safe: one thread adds, aborts and steps.

    Args:
        settings: The model and its limits.
        on_loaded: Called from another thread when a soft prompt has been read or a grammar compiled, so that a
            sleeping loop wakes.
        platform: The device; None chooses it from the settings.

    Raises:
        EngineStartError: If the model cannot be served with these settings.
    """

    def __init__(
        self,
        settings: EngineSettings,
        on_loaded: Callable[[], None] = lambda: None,
        platform: Platform | None = None,
    ) -> None:
        self._settings = settings
        try:
            self.runner = ModelRunner(settings, platform)
        except EngineStartError:
            raise
        except Exception as error:  # of a model that nobody has tried: its reason in words, and no traceback
            logger.debug("the model cannot be started", exc_info=error)
            raise EngineStartError(
                f"the model {settings.model!r} cannot be served ({type(error).__name__}: {error})"
            ) from error
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
        self._inspector = Inspector(self.runner, self.soft_prompts.read)
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
        """Whether a step has anything to do now; what waits for a soft prompt's file or a grammar does not count."""
        return self.scheduler.has_work

    @property
    def idle_seconds(self) -> float | None:
        """Seconds until a step has to end a sequence that still waits to be scheduled; None if there is none."""
        deadline = self._pending.next_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def num_unfinished(self) -> int:
        """Sequences that have not ended, wherever they wait; an ensemble is one."""
        return self.scheduler.num_sequences + len(self._pending)

    def add(self, request: AddRequest) -> list[TokenOutput]:
        """Admit a sequence; returns its only output if it is refused."""
        try:
            seq = Sequence(
                request.request_id,
                request.prompt_token_ids,
                request.params,
                request.soft_prompt,
                salt=request.salt,
                priority=request.priority,
                arrival=time.monotonic(),
                timeout=request.timeout,
            )
        except ValueError as error:
            return [TokenOutput(request.request_id, [], FinishReason.REFUSED, error=str(error))]
        seq.lead(request.others)
        refusal = self._refusal(seq)
        if refusal is not None:
            return [_failure(seq, refusal, FinishReason.REFUSED)]
        needs: list[Hashable] = []
        for member in seq.members:
            self._stats.prompt_tokens += member.num_prompt_tokens
            self._stats.virtual_tokens += member.num_virtual_tokens
            if member.soft_prompt is not None and not self.soft_prompts.acquire(member.soft_prompt):
                needs.append(member.soft_prompt.identity)
        if seq.params.constraint is not None:
            try:
                seq.matcher = self._grammars.matcher(seq.params.constraint, seq.salt)
            except TooManyGrammarsError as error:
                self._let_go(seq)
                return [_failure(seq, str(error), FinishReason.TIMEOUT)]
            if seq.matcher is None:
                needs.append(seq.params.constraint)
        if needs:
            self._pending.add(seq, needs)
        else:
            self.scheduler.add(seq)
        return []

    def abort(self, request_id: str) -> list[TokenOutput]:
        """End a sequence; returns its last output, or nothing if it had ended already."""
        seq = self.scheduler.abort(request_id)
        if seq is None:
            seq = self._pending.remove(request_id)
        if seq is None:
            return []
        self._let_go(seq)
        self._abandon_grammar(seq)
        return [TokenOutput(request_id, [], FinishReason.ABORT)]

    def pin(self, message: Pin | Unpin) -> None:
        """Keep a soft prompt's rows in host memory, or let them go."""
        if isinstance(message, Pin):
            self.soft_prompts.pin(message.soft_prompt)
        else:
            self.soft_prompts.unpin(message.soft_prompt)

    def inspect(self, message: Inspect, on_inspected: Callable[[Inspected], None]) -> None:
        """Compare a soft prompt with the model beside the steps; ``on_inspected`` is called from another thread."""
        self._inspector.inspect(message, on_inspected)

    def take_loaded(self) -> list[TokenOutput]:
        """Let sequences go on for which nothing is missing any more; returns the ends of those that cannot."""
        outputs: list[TokenOutput] = []
        loaded = self.soft_prompts.take_loaded()
        unreadable = {identity for identity, error in loaded if error is not None}
        for identity, error in loaded:
            if error is not None:
                for seq in self._pending.waiting_for(identity):
                    self._pending.remove(seq.request_id)
                    self._let_go(seq, unreadable)
                    self._abandon_grammar(seq)
                    outputs.append(_failure(seq, error))
            self._admit_pending(identity)
        for constraint, error in self._grammars.take_compiled():
            for seq in self._pending.waiting_for(constraint):
                if error is None:
                    seq.matcher = self._grammars.matcher(constraint, seq.salt)
                else:
                    self._pending.remove(seq.request_id)
                    self._let_go(seq)
                    is_busy = error == TOO_MANY_SLOW
                    reason = FinishReason.TIMEOUT if is_busy else FinishReason.CONSTRAINT
                    outputs.append(_failure(seq, error, reason))
            self._admit_pending(constraint)
        return outputs

    def step(self) -> list[TokenOutput]:
        """One token for every sequence that is ready for it; returns what is new."""
        started = time.monotonic()
        outputs = self.take_loaded() + self._expire(started)
        plan = self.scheduler.schedule(started)
        if plan.is_empty:
            return outputs
        computed = plan
        try:
            output = self.runner.run(plan, self.soft_prompts)
        except Exception as error:
            computed, output, ended = self._recover(plan, error)
            outputs += ended
        outputs += self._postprocess(computed, output)
        self._note_step(plan, time.monotonic() - started)
        return outputs

    @property
    def stats(self) -> EngineStats:
        """The state now."""
        stats, blocks = self._stats, self.scheduler.block_manager
        stats.num_running = self.scheduler.num_running
        stats.num_waiting = len(self.scheduler.waiting) + len(self._pending)
        stats.num_cached_blocks = blocks.num_cached
        stats.num_used_blocks = blocks.num_blocks - blocks.num_available
        stats.num_preemptions = self.scheduler.num_preemptions
        stats.prefix_cache_queries = blocks.stats.queries
        stats.prefix_cache_hits = blocks.stats.hits
        filled = [run for run in blocks.runs.values() if run.is_filled]
        stats.soft_prompts_resident = len(filled)
        stats.soft_prompt_bytes = sum(len(run.blocks) for run in filled) * self.runner.cache_spec.block_bytes
        stats.soft_prompt_loads = blocks.stats.run_loads
        stats.soft_prompt_evictions = blocks.stats.run_evictions
        stats.soft_prompt_hits = blocks.stats.run_hits
        stats.soft_prompt_misses = blocks.stats.run_loads
        stats.host = self.soft_prompts.stats
        return stats

    def close(self) -> None:
        """End the other threads and let go of the model."""
        self._grammars.close()
        self._inspector.close()
        self.soft_prompts.close()
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
        )

    def _refusal(self, seq: Sequence) -> str | None:
        """Why a sequence can not be taken; None where it can."""
        try:
            self.scheduler.check(seq)
        except ValueError as error:
            return str(error)
        params = seq.params
        if seq.request_id in self._pending:
            return f"request id {seq.request_id!r} is in use"
        wrong = _unknown_token_id(seq, self.model.vocab_size)
        if wrong is not None:
            return f"token id {wrong} is not in the vocabulary of {self.model.vocab_size} tokens"
        if params.prompt_logprobs_start < 0:
            return f"prompt_logprobs_start {params.prompt_logprobs_start} is before the text"
        if seq.followers and (params.prompt_logprobs is not None or params.classify):
            return "the members of an ensemble that generates together score no text"
        if params.prompt_logprobs is not None and not self.runner.scores_prompts:
            return f"{self.model.architecture} gives no logprobs of the text"
        if params.classify and not self.runner.scores_prompts:
            return f"{self.model.architecture} gives no hidden states to classify by"
        if params.classify and (seq.soft_prompt is None or seq.soft_prompt.num_labels is None):
            return "only a soft prompt with a classification head classifies"
        return None

    def _recover(self, plan: StepPlan, error: Exception) -> tuple[StepPlan, StepOutput, list[TokenOutput]]:
        """End the sequences at whose fault a step raised.

        Returns:
            What could be computed of it, what that gave, and the last outputs of those that ended.
        """
        logger.error("a step failed; computing its parts one by one", exc_info=error)
        try:
            if is_device_fault(error):
                raise error
            retry = retry_in_parts(
                plan,
                self.scheduler.running,
                lambda part: self.runner.run(part, self.soft_prompts),
                error,
                block_size=self.scheduler.block_manager.block_size,
                is_fatal=is_device_fault,
            )
        except Exception as fault:
            logger.exception("the device failed; all sequences are ended and the cache is cleared")
            return StepPlan(), StepOutput([]), self._fail_all(_reason(fault))
        self.scheduler.undo(retry.undone)
        ended = []
        for part, cause in retry.failed:
            of_part = [part.owner] if isinstance(part.owner, Sequence) else self.scheduler.holders(part.owner)
            for seq in of_part:
                if seq.finish_reason is None:
                    self._finish(seq, FinishReason.ERROR)
                    ended.append(_failure(seq, _reason(cause)))
        put_off = [seq for seq in retry.unserved if seq.finish_reason is None]
        for seq in put_off:
            self.scheduler.put_off(seq)
        logger.warning("%d sequences failed, %d are recomputed", len(ended), len(put_off))
        return retry.plan, retry.output, ended

    def _postprocess(self, plan: StepPlan, step: StepOutput) -> list[TokenOutput]:
        spoiled = self._end_spoiled(plan, step.spoiled)
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.seq.block_table and chunk.seq.request_id in step.prompt_logprobs:
                chunk.seq.prompt_logprobs += step.prompt_logprobs[chunk.seq.request_id]
        sampled = [seq for chunk in plan.chunks if (seq := chunk.seq) and chunk.samples and not seq.is_follower]
        logprobs = step.logprobs or [None] * len(sampled)
        outputs = []
        for seq, token, own in zip(sampled, step.tokens, logprobs, strict=True):
            if not seq.block_table:  # it has ended, or what it read is not what it should have been
                continue
            try:
                outputs.append(self._advance(seq, token, own, step.class_logits.get(seq.request_id)))
            except Exception as error:  # of its grammar, say: no other sequence has a part in it
                logger.exception("a sequence failed after its step")
                if seq.finish_reason is None:
                    self._finish(seq, FinishReason.ERROR)
                outputs.append(_failure(seq, _reason(error)))
        return spoiled + outputs

    def _end_spoiled(self, plan: StepPlan, spoiled: Mapping[int, int]) -> list[TokenOutput]:
        """End what has written keys and values that are not finite, before anybody else finds them."""
        if not spoiled:
            return []
        ended, holding = self.scheduler.spoil(plan, spoiled)
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.samples and not chunk.seq.block_table:
                chunk.seq.keep_draw()
        outputs = []
        for seqs, message in ((ended, NOT_FINITE_TEXT), (holding, NOT_FINITE_SOFT_PROMPT)):
            for seq in seqs:
                self._finish(seq, FinishReason.NOT_FINITE)
                outputs.append(_failure(seq, message, FinishReason.NOT_FINITE))
        return outputs

    def _advance(
        self, seq: Sequence, token: int, logprobs: Logprobs | None, class_logits: list[float] | None
    ) -> TokenOutput:
        """Give a sequence its next token, and end it where that is its last."""
        if token == NOT_FINITE or not all(map(isfinite, class_logits or ())):
            self._finish(seq, FinishReason.NOT_FINITE)
            return _failure(seq, NOT_FINITE_TEXT, FinishReason.NOT_FINITE)
        output = TokenOutput(seq.request_id, [])
        if seq.num_new_tokens == 0:
            output.num_cached_tokens = seq.num_cached_tokens
            if seq.first_run is not None:
                output.queue_seconds = seq.first_run - seq.arrival
                output.prefill_seconds = time.monotonic() - seq.first_run
            if seq.params.prompt_logprobs is not None:
                output.prompt_logprobs = seq.prompt_logprobs
            output.class_logits = class_logits
        if seq.params.max_tokens > 0 and token != NO_TOKEN:
            seq.token_ids.append(token)
            self._stats.generation_tokens += 1
            output.token_ids.append(token)
            output.logprobs = None if logprobs is None else [logprobs]
            if seq.matcher is not None:
                seq.matcher.advance(token)
            if self._ends(seq, token):
                seq.stop_token_id = output.stop_token_id = token
        error = self._constraint_error(seq, token)
        is_complete = seq.matcher is not None and error is None and (token == NO_TOKEN or seq.matcher.is_finished)
        if seq.stop_token_id is not None or is_complete:
            self._finish(seq, FinishReason.STOP)
        elif error is not None:
            self._finish(seq, FinishReason.CONSTRAINT)
            output.error = error
        elif seq.num_new_tokens == seq.params.max_tokens:
            self._finish(seq, FinishReason.LENGTH)
        output.finish_reason = seq.finish_reason
        return output

    def _ends(self, seq: Sequence, token: int) -> bool:
        if token in seq.params.stop_token_ids:
            return True
        # A grammar allows an end of sequence only as such.
        return token in self.model.eos_token_ids and (not seq.params.ignore_eos or seq.matcher is not None)

    def _constraint_error(self, seq: Sequence, token: int) -> str | None:
        """Why a sequence's constraint can not be followed after this token; None where it can."""
        if seq.matcher is None or seq.params.constraint is None:
            return None
        error = seq.matcher.error
        if error is not None:
            self._grammars.forget(seq.params.constraint)
        elif token == NO_TOKEN and not seq.matcher.is_complete:
            error = NO_WAY_ON
        return error

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(seq, reason)
        self._let_go(seq)

    def _let_go(self, seq: Sequence, unreadable: Collection[str] = ()) -> None:
        """Give back its soft prompts; of those that could not be read the loader knows nothing any more."""
        for member in seq.members:
            if member.soft_prompt is not None and member.soft_prompt.identity not in unreadable:
                self.soft_prompts.release(member.soft_prompt)

    def _abandon_grammar(self, seq: Sequence) -> None:
        """End the compiling of a grammar that only this sequence waited for."""
        constraint = seq.params.constraint
        if constraint is not None and seq.matcher is None and not self._pending.waiting_for(constraint):
            self._grammars.abandon(constraint)

    def _expire(self, now: float) -> list[TokenOutput]:
        """End what has not begun to run by its deadline, for whichever reason it waits."""
        late = self.scheduler.expire(now)
        late += self._pending.expire(now)
        outputs = []
        for seq in late:
            seq.finish_reason = FinishReason.TIMEOUT
            self._let_go(seq)
            self._abandon_grammar(seq)
            self._stats.num_timeouts += 1
            message = f"the request timed out after {now - seq.arrival:.1f} seconds in the queue; try again later"
            outputs.append(TokenOutput(seq.request_id, [], FinishReason.TIMEOUT, error=message))
        return outputs

    def _admit_pending(self, need: Hashable) -> None:
        for seq in self._pending.supply(need):
            self.scheduler.add(seq)

    def _fail_all(self, message: str) -> list[TokenOutput]:
        """End everything that a broken step may have touched; its blocks hold nothing that can be trusted."""
        seqs = [*self.scheduler.running, *self.scheduler.waiting]
        for seq in seqs:
            self._let_go(seq)
        self.scheduler = self._make_scheduler()
        return [_failure(seq, message) for seq in seqs]

    def _note_step(self, plan: StepPlan, seconds: float) -> None:
        stats = self._stats
        stats.steps += 1
        stats.step_seconds.observe(STEP_SECONDS_BOUNDS, seconds)
        stats.batch_size.observe(BATCH_SIZE_BOUNDS, sum(chunk.seq is not None for chunk in plan.chunks))
        stats.batch_tokens.observe(BATCH_TOKENS_BOUNDS, plan.num_tokens)
        stats.batch_distinct_prompts.observe(DISTINCT_PROMPTS_BOUNDS, plan.num_distinct_prompts)
        stats.max_batch_distinct_prompts = max(stats.max_batch_distinct_prompts, plan.num_distinct_prompts)


def _unknown_token_id(seq: Sequence, vocab_size: int) -> int | None:
    """A token id that a sequence names and the model has no row for; None if there is none.

    A lookup beyond a table's end fails the whole step, and on a GPU the process. So the engine looks for itself,
    whoever has looked before.
    """
    params = seq.params
    for token_ids in (seq.token_ids, params.logit_bias, params.stop_token_ids):
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < vocab_size:
                return token_id
    return None


def _reason(error: Exception) -> str:
    return f"the model failed to compute this request ({type(error).__name__}: {error})"


def _failure(seq: Sequence, message: str, reason: FinishReason = FinishReason.ERROR) -> TokenOutput:
    seq.finish_reason = reason
    return TokenOutput(seq.request_id, [], reason, error=message)
