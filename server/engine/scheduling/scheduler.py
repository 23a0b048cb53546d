"""Decides which positions of which sequences the next step computes. Pure logic: no torch, no clock.

A step has a budget of tokens and of sequences. Decodes come first, one token each; then the prefills in progress;
then waiting sequences in the order of ``FairQueue``. Prompts are computed in chunks, as the budget allows.

When blocks run out, the last sequence of ``running`` is preempted: it releases its blocks and is recomputed later.
``running`` is ordered by urgency class, then by turn, so this is the least urgent sequence with the latest turn.

Every sequence ends. Of the unfinished sequences of the most urgent class that had a turn, consider the one with the
earliest turn. It is the first of ``running``, so no other sequence preempts it, and ``check`` ensures that it fits
into the cache alone; while it waits, it is the first to resume. So every step advances it until it ends, and then the
same holds for the next one. Later arrivals get later turns, and only finitely many can be more urgent or be promoted
with an earlier turn.

A sequence whose soft prompt is not on the device acquires a run of blocks for it. Keys and values are copied into the
run within the same step, up to ``step_fill_tokens``. Larger ones are *loaded*: copied beside the steps, so that no
step waits for them. The sequences that wait for a load start in the step after its end. Blocks that are loading
cannot be taken, but every load ends; a running sequence that finds no other block to take waits for that.

Embeddings are computed as a separate chunk, shared by all sequences that wait for them. These start in the step that
completes the run, because each layer writes all keys and values before it reads any. A partial last block would have
to be copied before the forward pass, so each of them computes the block's few virtual tokens again, in its own block.
Adapters are read into a memory of limited size when the turn of a sequence is near: see ``AdapterTurns``.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from math import inf

from server.engine.scheduling.adapter_memory import AdapterMemory
from server.engine.scheduling.adapter_turns import AdapterTurns
from server.engine.scheduling.batch_tier import BatchTier
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.fair_queue import FairQueue
from server.engine.scheduling.next_decodes import next_decodes
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.sequence import Sequence, check_fits
from server.engine.scheduling.soft_prompt_fills import SoftPromptFills
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.scheduling.spoiled_blocks import withdraw_spoiled
from server.engine.types import ErrorCode, FinishReason

AGING_TURNS = 16
"""Turns, or sequences of maximum size, that may overtake a less urgent class before it has a sequence promoted."""


class Scheduler:
    """Admission, chunked prefill, preemption and abort.

    Args:
        block_manager: Allocates the blocks.
        max_num_seqs: Maximum number of running sequences.
        max_num_batched_tokens: Maximum number of positions that one step computes.
        max_model_len: Maximum number of positions of one sequence.
        quantum: Tokens of one turn of a waiting tenant; None is ``max_num_batched_tokens``.
        batch_step_tokens: Maximum of tokens of the tier ``batch`` in a step; None is ``max_num_batched_tokens``.
        step_fill_tokens: Virtual tokens of keys and values that one step copies at most; what is over it is loaded
            beside the steps. None: a step copies all.
        adapter_memory: The adapters in memory; None if none are served.

    Attributes:
        waiting: Sequences without blocks; an ensemble is represented by its leader.
        running: Sequences with blocks, ordered by urgency class, then by turn; the last is preempted first. An
            ensemble is represented by its leader.
        num_running: Running sequences; every member of an ensemble counts.
        num_preemptions: Preemptions of running sequences, without those of the service tier ``batch``.
        batch: What the service tier ``batch`` takes of a step.
        adapters: The adapters of sequences whose turn has come.

    Raises:
        ValueError: If a step could not hold one token of every running sequence.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        quantum: int | None = None,
        batch_step_tokens: int | None = None,
        step_fill_tokens: int | None = None,
        adapter_memory: AdapterMemory | None = None,
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs {max_num_seqs} must be at least 1 and at most "
                f"max_num_batched_tokens {max_num_batched_tokens}"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        quantum = quantum or max_num_batched_tokens
        aging_tokens = AGING_TURNS * max(quantum, max_model_len)
        self.waiting = FairQueue(quantum=quantum, aging_tokens=aging_tokens)
        self.adapters = AdapterTurns(adapter_memory, self.waiting, max_overtaken=aging_tokens)
        self.batch = BatchTier(batch_step_tokens or max_num_batched_tokens)
        self.running: list[Sequence] = []
        self.num_running = 0
        self.num_preemptions = 0
        self._fills = SoftPromptFills(block_manager, step_fill_tokens)
        self._held_runs = self._fills.held
        self._ahead: list[Chunk] | None = None
        self._seqs: dict[str, Sequence] = {}
        self._deadlines: dict[str, float] = {}
        self._next_deadline = inf

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._seqs)

    @property
    def num_sequences(self) -> int:
        """Sequences that wait or run; an ensemble counts once."""
        return len(self._seqs)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of a sequence that has not run, on the engine's clock; None if none has one."""
        return min(self._deadlines.values(), default=None)

    def check(self, seq: Sequence) -> None:
        """Refuse a sequence that could never finish.

        Raises:
            ValueError: If it exceeds a limit, or its id is in use.
        """
        if seq.request_id in self._seqs:
            raise ValueError(f"request id {seq.request_id!r} is in use")
        blocks, sizes = self.block_manager, {"max_num_seqs": self.max_num_seqs, "max_model_len": self.max_model_len}
        check_fits(seq, blocks.blocks_to_finish, num_blocks=blocks.num_blocks, **sizes)
        self.adapters.check(seq)

    def add(self, seq: Sequence) -> None:
        """Put a sequence into the queue.

        Raises:
            ValueError: As ``check`` does.
        """
        self.check(seq)
        self._seqs[seq.request_id] = seq
        self.batch.num_sequences += seq.is_batch
        self.adapters.add(seq)
        self.waiting.push(seq)
        if seq.deadline is not None:
            self._deadlines[seq.request_id] = seq.deadline
            self._next_deadline = min(self._next_deadline, seq.deadline)

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence between two steps.

        Returns:
            The sequence, or None if none has this id (it may just have ended).
        """
        seq = self._seqs.get(request_id)
        if seq is not None:
            self.finish(seq, FinishReason.ABORT)
        return seq

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences that have not run by their deadline. Call it between two steps.

        Args:
            now: Seconds of the engine's clock.
        """
        if now < self._next_deadline:
            return []
        late = [self._seqs[request_id] for request_id, deadline in self._deadlines.items() if deadline <= now]
        for seq in late:
            self.finish(seq, ErrorCode.WAIT_TIMEOUT)
        self._next_deadline = min(self._deadlines.values(), default=inf)
        return late

    def finish(self, seq: Sequence, reason: FinishReason | ErrorCode) -> None:
        """End a sequence and release everything that it holds."""
        seq.end_reason = reason
        del self._seqs[seq.request_id]
        self.batch.num_sequences -= seq.is_batch
        self._deadlines.pop(seq.request_id, None)
        if seq.block_table:
            self._stop_running(seq)
        else:
            self.waiting.remove(seq)
        self._release(seq)

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step, and advance ``num_computed`` of everything in it.

        Args:
            now: Seconds of the engine's clock; becomes ``first_run`` of sequences that start to run.
        """
        self.batch.begin(self.running, self.waiting)
        plan = self._plan(now)
        if plan.is_empty and self.batch.lift():  # what holds it waits for something else than a step
            plan = self._plan(now)
        return plan

    def _plan(self, now: float) -> StepPlan:
        plan = StepPlan()
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            budget = self._schedule_decodes(plan, self.max_num_batched_tokens)
        else:
            budget = self._take_ahead(plan, ahead)
        budget = self._schedule_prefills(plan, budget)
        self._schedule_waiting(plan, budget, now)
        is_loading = self.block_manager.is_loading or self.adapters.is_reading
        if plan.is_empty and not is_loading and self._release_waiting_runs():
            # Soft prompts held for later sequences had left no block for the first one.
            self._schedule_waiting(plan, budget, now)
        return plan

    def plan_ahead(self) -> None:
        """Plan the decodes of the next step while the last one is computed. Optional: ``schedule`` also does it."""
        self._ahead = next_decodes(self.running, self.block_manager)

    def undo(self, plan: StepPlan) -> None:
        """Undo a plan that could not be computed, so that no sequence finds blocks that were not written.

        The caller must finish or preempt the sequences of these chunks, and those that hold these runs, before the
        next step.
        """
        for run in plan.key_value_fills:
            run.num_computed = 0
        for chunk in plan.chunks:
            if chunk.run is not None:
                chunk.run.num_computed = chunk.start
            elif chunk.seq is not None:
                self.block_manager.unregister(chunk.seq, chunk.start)

    def preempt(self, seq: Sequence) -> None:
        """Release a running sequence's blocks; it waits again and is recomputed in its turn."""
        self._stop_running(seq)
        self._release(seq)
        self.waiting.resume(seq)
        self.num_preemptions += not seq.is_batch

    def holders(self, run: SoftPromptRun) -> list[Sequence]:
        """The sequences that hold a soft prompt's run, running or waiting; the leader for an ensemble."""
        return [
            seq
            for seq in self._seqs.values()
            if any(self._held_runs.get(member.request_id) is run for member in seq.members)
        ]

    def spoil(self, plan: StepPlan, spoiled: Mapping[int, int]) -> tuple[list[Sequence], list[Sequence]]:
        """Withdraw the non-finite blocks that a step wrote, so that no other sequence finds them.

        Blocks that were computed after spoiled ones, in the same step and by any sequence, are withdrawn too. A soft
        prompt that was being filled is dropped with its last reference.

        A sequence that read spoiled blocks which another sequence wrote in the same step may be healthy itself. It is
        preempted and recomputed.

        Args:
            plan: The step, just computed.
            spoiled: The ``spoiled`` of the step's ``StepOutput``.

        Returns:
            The sequences that the caller must end: those that wrote spoiled blocks themselves, and those that hold a
            spoiled soft prompt, running or waiting.
        """
        seqs = [*self.running, *self.waiting.returned]
        return withdraw_spoiled(plan, spoiled, seqs, self._held_runs, self.block_manager, self.preempt)

    def check_integrity(self) -> None:
        """Check between two steps that queues, blocks, soft prompts and decodes planned ahead are consistent.

        Raises:
            AssertionError: If they are not; a bug in this package.
        """
        if len(self._seqs) != len(self.waiting) + len(self.running):
            raise AssertionError("a sequence is lost or queued twice")
        waiting = [member for seq in self.waiting for member in seq.members]
        running = [member for seq in self.running for member in seq.members]
        if any(seq.block_table for seq in waiting) or not all(seq.block_table for seq in running):
            raise AssertionError("blocks are held exactly while running")
        if any(seq.is_follower for seq in self._seqs.values()):
            raise AssertionError("a member of an ensemble is scheduled without the others")
        if self.num_running != len(running):
            raise AssertionError("running sequences are counted wrongly")
        if self.running != sorted(self.running, key=_precedence):
            raise AssertionError("running sequences are out of order")
        if not self._deadlines.keys() <= {seq.request_id for seq in self.waiting if seq.first_run is None}:
            raise AssertionError("a deadline is kept for a sequence that ran")
        may_hold = [*running, *(member for seq in self.waiting.returned for member in seq.members)]
        if not self._held_runs.keys() <= {seq.request_id for seq in may_hold}:
            raise AssertionError("a soft prompt is held for a sequence whose turn has not come, or that ended")
        ready = [own for seq in self.running if _is_ready(seq) for own in seq.members]
        if self._ahead is not None and [chunk.seq for chunk in self._ahead if chunk.still_runs] != ready:
            raise AssertionError("the decodes that were planned ahead are not those of the next step")
        self.waiting.check_integrity()
        self.adapters.check_integrity(self.running)
        self.block_manager.check_integrity(
            [(seq, self._held_runs.get(seq.request_id)) for seq in [*running, *waiting]]
        )

    # Scheduling one step

    def _schedule_decodes(self, plan: StepPlan, budget: int) -> int:
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            members = seq.members
            if not self.batch.may_run(seq):
                break
            if budget >= len(members) and _is_ready(seq):
                if not self._make_room(seq):
                    break  # it was the last one, and has been preempted itself or waits for blocks
                for member in members:
                    self._add_chunk(plan, member, 1)
                budget -= len(members)
            index += 1
        return budget

    def _take_ahead(self, plan: StepPlan, ahead: list[Chunk]) -> int:
        """Plan the decodes of ``plan_ahead`` whose sequences still run; returns the remaining budget."""
        for chunk in ahead:
            if chunk.seq is not None and chunk.still_runs and self.batch.may_run(chunk.seq):
                self._commit(plan, chunk, chunk.seq)
        # A step has room for a decode of every running sequence.
        return self.max_num_batched_tokens - len(plan.chunks)

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        for seq in self.running:
            if not self.batch.may_run(seq):
                break
            if seq.num_computed < seq.num_positions and not self._lacks_blocks(seq):
                room = self.batch.room(seq, plan, budget)
                budget -= room - self._prefill(plan, seq, room)
        return budget

    def _schedule_waiting(self, plan: StepPlan, budget: int, now: float) -> None:
        filling = {chunk.run.key for chunk in plan.chunks if chunk.run is not None}
        unserved: list[Sequence] = []
        num_slots = self.max_num_seqs - self.num_running
        self.adapters.begin()
        while budget > 0:
            if num_slots <= 0 and self.waiting.has_interactive:
                num_slots += self._yield_batch()
            seq = self.waiting.take() if num_slots > 0 else None
            if seq is None:
                break
            members = seq.members
            unserved.append(seq)
            if not (self.batch.may_run(seq) and self.batch.may_start(seq, self.running)):
                break
            budget = self.batch.room(seq, plan, budget)  # only batch sequences are behind one
            if budget <= 0:
                break
            while len(members) > num_slots and (freed := self._yield_batch()):
                num_slots += freed
            if len(members) > num_slots or not self.adapters.may_overtake:
                break  # later sequences wait, or an ensemble could wait forever
            while not (is_held := self.adapters.hold(seq, now)) and self.adapters.lacks_room:
                if not (freed := self._yield_batch()):
                    break
                num_slots += freed
            if not is_held:
                num_slots -= len(members)
                continue
            has_blocks, budget = self._fills.add(plan, members, budget, filling, self.num_running)
            if not has_blocks:
                if freed := self._yield_batch():
                    num_slots += freed
                    self.waiting.put_back(unserved.pop())
                    continue
                break  # later sequences wait, or one with a large soft prompt could wait forever
            if not self._can_start(members, budget, filling):
                num_slots -= len(members)
                continue
            # A reserve of one block per running sequence, so that an admission does not cause a preemption at once.
            admissions = self.block_manager.admit_all(
                [(member, self._held_runs.get(member.request_id)) for member in members],
                headroom=self.num_running,
                filling=filling,
            )
            if admissions is None:
                if freed := self._yield_batch():
                    num_slots += freed
                    self.waiting.put_back(unserved.pop())
                    continue
                break
            unserved.pop()
            num_slots -= len(members)
            plan.block_copies += [admission.copy for admission in admissions if admission.copy is not None]
            if seq.first_run is None:
                seq.first_run = now
                seq.num_cached_tokens = sum(admission.num_cached_tokens for admission in admissions)
                self._deadlines.pop(seq.request_id, None)
            self.waiting.serve(seq)
            self.adapters.start(seq)
            insort(self.running, seq, key=_precedence)
            self.num_running += len(members)
            budget = self._prefill(plan, seq, budget)
        unserved += self.adapters.read_ahead(now)
        for seq in unserved:
            self.waiting.put_back(seq)

    def _prefill(self, plan: StepPlan, seq: Sequence, budget: int) -> int:
        """Plan as much of a sequence as the budget allows; returns the remaining budget.

        The members of an ensemble reach their last position in the same step, because it needs their logits together.
        """
        members = seq.members
        missing = [member.num_positions - member.num_computed for member in members]
        num_deferred = 1 if seq.followers and sum(missing) > budget else 0
        for member, count in zip(members, missing, strict=True):
            num_tokens = min(count - num_deferred, budget)
            if num_tokens > 0:
                self._add_chunk(plan, member, num_tokens)
                budget -= num_tokens
        return budget

    def _can_start(self, members: tuple[Sequence, ...], budget: int, filling: set[str]) -> bool:
        """Whether sequences, which hold their soft prompts, start in this step.

        Virtual tokens of a partial last block that this step computes are computed again for each sequence. If the
        budget leaves no room for text after them, waiting costs nothing: a later step copies the block.
        """
        runs = [run for member in members if (run := self._held_runs.get(member.request_id)) is not None]
        block_size = self.block_manager.block_size
        num_repeated = sum(run.source.num_virtual_tokens % block_size for run in runs if run.key in filling)
        return all(run.is_filled for run in runs) and (num_repeated == 0 or num_repeated < budget)

    def _add_chunk(self, plan: StepPlan, seq: Sequence, num_tokens: int) -> None:
        self._commit(plan, Chunk(seq.block_table, seq.num_computed, num_tokens, seq=seq), seq)

    def _commit(self, plan: StepPlan, chunk: Chunk, seq: Sequence) -> None:
        plan.chunks.append(chunk)
        seq.num_computed = chunk.stop
        chunk.shared = self.block_manager.register(seq, chunk.stop)

    def _make_room(self, seq: Sequence) -> bool:
        """Allocate blocks for the next position of a sequence and its followers.

        Returns:
            False if it was preempted itself, or waits for blocks that are loading.
        """
        for member in seq.members:
            while not self.block_manager.extend(member, member.num_positions):
                if self._release_waiting_runs():
                    continue
                victim = self.running[-1]
                if victim is seq and self.block_manager.is_loading:
                    return False
                self.preempt(victim)
                if victim is seq:
                    return False
        return True

    def _lacks_blocks(self, seq: Sequence) -> bool:
        """Whether ``_make_room`` found no block for the next position of a sequence or a follower."""
        return any(len(own.block_table) < self.block_manager.blocks_for(own.num_positions) for own in seq.members)

    def _yield_batch(self) -> int:
        """Preempt a batch sequence, if an interactive one lacks its place; returns the number of free slots."""
        victim = self.batch.victim(self.running)
        if victim is None:
            return 0
        self.preempt(victim)
        return len(victim.members)

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.num_running -= len(seq.members)

    def _release_waiting_runs(self) -> bool:
        """Release the soft prompts of waiting sequences, which acquire them again later. False if none held any.

        Those that are loading are kept, because their blocks would not become available.
        """
        names = [member.request_id for seq in self.waiting.returned for member in seq.members]
        holders = [name for name in names if (run := self._held_runs.get(name)) and not run.is_loading]
        for name in holders:
            self._fills.release(name)
        return bool(holders)

    def _release(self, seq: Sequence) -> None:
        self.adapters.release(seq)
        for member in seq.members:
            self.block_manager.free(member)
            self._fills.release(member.request_id)


def _precedence(seq: Sequence) -> tuple[int, int]:
    """The order of ``running``: urgency class, then turn."""
    return seq.urgency, -1 if seq.turn is None else seq.turn


def _is_ready(seq: Sequence) -> bool:
    """Whether a running sequence decodes: one position of each member is missing."""
    return all(own.num_computed == own.num_positions - 1 for own in seq.members)
