"""Which positions of which sequences the next step computes. Pure logic: no torch, no clock.

A step has a budget of tokens and of sequences. Decodes come first, one token each; then the prefills under way;
then waiting sequences in order of arrival, whose prompts are computed in chunks as the budget allows. When
blocks run out, the newest running sequence gives its own back and is computed again later. The oldest is never
made to, so something always finishes and nothing waits for ever.

A sequence whose soft prompt is not on the device takes a run of blocks for it. Keys and values are copied in
within the same step. Embeddings are computed as a chunk of their own, shared by all that wait for them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from server.engine.block_manager import BlockManager, RunKey, SoftPromptRun
from server.engine.types import FinishReason, Sequence


@dataclass(slots=True)
class Chunk:
    """Consecutive positions of one sequence, or of one soft prompt being filled, that a step computes.

    Attributes:
        block_table: Where keys and values of its positions lie.
        start: First position to compute.
        num_tokens: Positions to compute.
        seq: The sequence, or None for a soft prompt.
        run: The soft prompt being filled, or None.
    """

    block_table: list[int]
    start: int
    num_tokens: int
    seq: Sequence | None = None
    run: SoftPromptRun | None = None

    @property
    def stop(self) -> int:
        """The position after the last one to compute."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the last position's logits choose a new token."""
        return self.seq is not None and self.stop == self.seq.num_positions


@dataclass(slots=True)
class StepPlan:
    """One step: first the fills, then the copies, then one forward pass over the chunks.

    Attributes:
        key_value_fills: Soft prompts whose keys and values are copied into their blocks.
        block_copies: (source, destination) blocks: partial last blocks of soft prompts.
        chunks: What the forward pass computes; decodes first.
    """

    key_value_fills: list[SoftPromptRun] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.chunks and not self.key_value_fills

    @property
    def num_tokens(self) -> int:
        """Positions that the forward pass computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_distinct_prompts(self) -> int:
        """Different soft prompts (or tasks of one) that stand before the chunks' sequences."""
        return len({chunk.seq.soft_prompt.identity for chunk in self.chunks if chunk.seq and chunk.seq.soft_prompt})


class Scheduler:
    """Admission, chunked prefill, preemption and abort.

    Args:
        block_manager: Where blocks come from.
        max_num_seqs: Sequences that may run at once.
        max_num_batched_tokens: Positions that one step may compute.
        max_model_len: Positions of one sequence.

    Raises:
        ValueError: If a step could not hold one token of every running sequence.
    """

    def __init__(
        self, block_manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs {max_num_seqs} has to be at least 1 and at most "
                f"max_num_batched_tokens {max_num_batched_tokens}"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._held_runs: dict[str, SoftPromptRun] = {}
        self._seqs: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._seqs)

    @property
    def num_sequences(self) -> int:
        """Sequences that wait or run."""
        return len(self._seqs)

    def check(self, seq: Sequence) -> None:
        """Refuse a sequence that could never be finished.

        Raises:
            ValueError: With the numbers; or if its id is taken.
        """
        if seq.request_id in self._seqs:
            raise ValueError(f"request id {seq.request_id!r} is in use")
        longest = seq.num_positions + seq.params.max_tokens
        if longest > self.max_model_len:
            raise ValueError(
                f"{seq.num_virtual_tokens} virtual tokens, {seq.num_prompt_tokens} text tokens and "
                f"{seq.params.max_tokens} new ones are more than the {self.max_model_len} positions of the context"
            )
        # The last new token is returned, never fed back, so it needs no slot.
        needed = self.block_manager.blocks_to_finish(seq.soft_prompt, max(seq.num_positions, longest - 1))
        if needed > self.block_manager.num_blocks:
            raise ValueError(
                f"the sequence needs {needed} key/value blocks; the cache has {self.block_manager.num_blocks} in all"
            )

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait for its turn.

        Raises:
            ValueError: As ``check`` does.
        """
        self.check(seq)
        self._seqs[seq.request_id] = seq
        self.waiting.append(seq)

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence between two steps.

        Returns:
            The sequence, or None if there is none of that id (it may just have ended).
        """
        seq = self._seqs.get(request_id)
        if seq is not None:
            self.finish(seq, FinishReason.ABORT)
        return seq

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence and give back all that it holds."""
        seq.finish_reason = reason
        del self._seqs[seq.request_id]
        if seq.block_table:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._release(seq)

    def schedule(self) -> StepPlan:
        """Plan the next step and advance ``num_computed`` of everything in it."""
        plan = StepPlan()
        budget = self._schedule_decodes(plan, self.max_num_batched_tokens)
        budget = self._schedule_prefills(plan, budget)
        self._schedule_waiting(plan, budget)
        if plan.is_empty and self.waiting:
            # Soft prompts held for later sequences may leave no block for the first; then they have to let go.
            self._release_waiting_runs(keep=self.waiting[0])
            self._schedule_waiting(plan, budget)
        return plan

    def check_integrity(self) -> None:
        """Hold queues, blocks and soft prompts against each other.

        Raises:
            AssertionError: If they disagree; a fault of this package.
        """
        if len(self._seqs) != len(self.waiting) + len(self.running):
            raise AssertionError("a sequence is lost or queued twice")
        if any(seq.block_table for seq in self.waiting) or not all(seq.block_table for seq in self.running):
            raise AssertionError("blocks are held exactly while running")
        if not self._held_runs.keys() <= self._seqs.keys():
            raise AssertionError("a soft prompt is held for a sequence that ended")
        self.block_manager.check_integrity(
            [(seq, self._held_runs.get(seq.request_id)) for seq in self._seqs.values()]
        )

    # Inside a step

    def _schedule_decodes(self, plan: StepPlan, budget: int) -> int:
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            if seq.num_computed == seq.num_positions - 1 and budget > 0:
                if not self._make_room(seq):
                    break  # it was the newest, and is preempted itself
                self._add_chunk(plan, seq, 1)
                budget -= 1
            index += 1
        return budget

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        for seq in self.running:
            missing = seq.num_positions - seq.num_computed
            if missing > 1 and budget > 0:
                num_tokens = min(missing, budget)
                self._add_chunk(plan, seq, num_tokens)
                budget -= num_tokens
        return budget

    def _schedule_waiting(self, plan: StepPlan, budget: int) -> None:
        filling = {chunk.run.key for chunk in plan.chunks if chunk.run is not None}
        still_waiting: deque[Sequence] = deque()
        while self.waiting and budget > 0 and len(self.running) + len(still_waiting) < self.max_num_seqs:
            seq = self.waiting.popleft()
            run, used = self._fill_soft_prompt(plan, seq, budget, filling)
            budget -= used
            if seq.soft_prompt is not None and run is None:
                self.waiting.appendleft(seq)
                break  # no blocks for the soft prompt; what came later waits behind
            if run is not None and not self._is_usable(run, filling):
                still_waiting.append(seq)
                continue
            # One block in reserve for every running sequence keeps an admission from preempting at once.
            admission = self.block_manager.admit(seq, run, headroom=len(self.running))
            if admission is None:
                self.waiting.appendleft(seq)
                break
            if admission.copy is not None:
                plan.block_copies.append(admission.copy)
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = admission.num_cached_tokens
            self.running.append(seq)
            if budget > 0:
                num_tokens = min(seq.num_positions - seq.num_computed, budget)
                self._add_chunk(plan, seq, num_tokens)
                budget -= num_tokens
        self.waiting.extendleft(reversed(still_waiting))

    def _fill_soft_prompt(
        self, plan: StepPlan, seq: Sequence, budget: int, filling: set[RunKey]
    ) -> tuple[SoftPromptRun | None, int]:
        """Hold the sequence's soft prompt and plan what is missing of it; returns it and the budget used."""
        source = seq.soft_prompt
        if source is None:
            return None, 0
        run = self._held_runs.get(seq.request_id)
        if run is None:
            run = self.block_manager.acquire_run(source, seq.salt)
            if run is None:
                return None, 0
            self._held_runs[seq.request_id] = run
        if run.is_filled or run.key in filling:
            return run, 0
        if source.is_key_values:
            plan.key_value_fills.append(run)
            run.num_computed = source.num_virtual_tokens
            return run, 0
        num_tokens = min(source.num_virtual_tokens - run.num_computed, budget)
        plan.chunks.append(Chunk(run.blocks, run.num_computed, num_tokens, run=run))
        run.num_computed += num_tokens
        filling.add(run.key)
        return run, num_tokens

    def _is_usable(self, run: SoftPromptRun, filling: set[RunKey]) -> bool:
        """Whether a sequence may follow the soft prompt in this step.

        Full blocks may be read in the step that computes them; a partial last block has to be copied before it.
        """
        if not run.is_filled:
            return False
        return run.key not in filling or run.source.num_virtual_tokens % self.block_manager.block_size == 0

    def _add_chunk(self, plan: StepPlan, seq: Sequence, num_tokens: int) -> None:
        plan.chunks.append(Chunk(seq.block_table, seq.num_computed, num_tokens, seq=seq))
        seq.num_computed += num_tokens
        self.block_manager.register(seq, self._held_runs.get(seq.request_id), seq.num_computed)

    def _make_room(self, seq: Sequence) -> bool:
        """Find a block for the sequence's next position; False if it had to give up its own."""
        while not self.block_manager.extend(seq, seq.num_positions):
            if self._release_waiting_runs(keep=None):
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _release_waiting_runs(self, keep: Sequence | None) -> bool:
        """Take soft prompts from waiting sequences, except one; they are acquired again in turn."""
        holders = [seq for seq in self.waiting if seq is not keep and seq.request_id in self._held_runs]
        for seq in holders:
            self._release(seq)
        return bool(holders)

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        run = self._held_runs.pop(seq.request_id, None)
        if run is not None:
            self.block_manager.release_run(run)
