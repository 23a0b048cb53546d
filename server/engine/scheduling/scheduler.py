"""Which positions of which sequences the next step computes. Pure logic: no torch, and no clock of its own.

A step has a budget of tokens and of sequences. Decodes come first, one token each; then the prefills under way;
then waiting sequences in the order of ``FairQueue``, whose texts are computed in chunks as the budget allows.

When blocks run out, the running sequence of the least urgent class that had its turn last gives its own back and is
computed again later. This cannot go on for ever: of the unfinished sequences of the most urgent class that had a
turn, take the one that had it first. Nobody is before it in ``running``, so it is never made to give up its blocks
for another, and ``check`` has made sure that it fits alone; nobody is before it among the waiting either, once it
was made to wait. So each step takes it further, it ends, and then the same holds for the next. Sequences that arrive
meanwhile have their turns later, and only finitely many can be more urgent or be promoted with an earlier turn.

A sequence whose soft prompt is not on the device takes a run of blocks for it. Keys and values are copied in
within the same step. Embeddings are computed as a chunk of their own, shared by all that wait for them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from math import inf

from server.engine.scheduling.block_manager import BlockManager, SoftPromptRun
from server.engine.scheduling.fair_queue import FairQueue
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.sequence import Sequence
from server.engine.types import FinishReason

AGING_TURNS = 16
"""Turns, or sequences of the largest size, that may pass a less urgent class before one of its own is promoted."""


class Scheduler:
    """Admission, chunked prefill, preemption and abort.

    Args:
        block_manager: Where blocks come from.
        max_num_seqs: Sequences that may run at once.
        max_num_batched_tokens: Positions that one step may compute.
        max_model_len: Positions of one sequence.
        quantum: Tokens of one turn of a waiting tenant; None takes a step's worth.

    Attributes:
        waiting: Sequences without blocks; an ensemble waits, and runs, as its leader.
        running: Sequences with blocks, the most urgent class first, in each by turn; the last is preempted first.
        num_running: Sequences that a step computes a token of, every member of an ensemble counted.
        num_preemptions: Preemptions of running sequences.

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
        self.waiting = FairQueue(quantum=quantum, aging_tokens=AGING_TURNS * max(quantum, max_model_len))
        self.running: list[Sequence] = []
        self.num_running = 0
        self.num_preemptions = 0
        self._held_runs: dict[str, SoftPromptRun] = {}
        self._seqs: dict[str, Sequence] = {}
        self._deadlines: dict[str, float] = {}
        self._next_deadline = inf

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._seqs)

    @property
    def num_sequences(self) -> int:
        """Sequences that wait or run; an ensemble is one."""
        return len(self._seqs)

    def check(self, seq: Sequence) -> None:
        """Refuse a sequence that could never be finished.

        Raises:
            ValueError: With the numbers; or if its id is taken.
        """
        if seq.request_id in self._seqs:
            raise ValueError(f"request id {seq.request_id!r} is in use")
        members = seq.members
        if len(members) > self.max_num_seqs:
            raise ValueError(
                f"an ensemble of {len(members)} is more than the {self.max_num_seqs} sequences that may run at once"
            )
        for member in members:
            if member.num_positions + seq.params.max_tokens > self.max_model_len:
                raise ValueError(
                    f"{member.num_virtual_tokens} virtual tokens, {seq.num_prompt_tokens} text tokens and "
                    f"{seq.params.max_tokens} new ones are more than the {self.max_model_len} positions of the "
                    "context"
                )
        needed = sum(self._blocks_to_finish(member) for member in members)
        if needed > self.block_manager.num_blocks:
            what = f"the {len(members)} sequences of the ensemble need" if seq.followers else "the sequence needs"
            raise ValueError(
                f"{what} {needed} key/value blocks; the cache has {self.block_manager.num_blocks} in all"
            )

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait for its turn.

        Raises:
            ValueError: As ``check`` does.
        """
        self.check(seq)
        self._seqs[seq.request_id] = seq
        self.waiting.push(seq)
        if seq.deadline is not None:
            self._deadlines[seq.request_id] = seq.deadline
            self._next_deadline = min(self._next_deadline, seq.deadline)

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence between two steps.

        Returns:
            The sequence, or None if there is none of that id (it may just have ended).
        """
        seq = self._seqs.get(request_id)
        if seq is not None:
            self.finish(seq, FinishReason.ABORT)
        return seq

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline has come before they ever ran. Called between two steps.

        Args:
            now: Seconds, of the clock that ``Sequence.deadline`` is in.
        """
        if now < self._next_deadline:
            return []
        late = [self._seqs[request_id] for request_id, deadline in self._deadlines.items() if deadline <= now]
        for seq in late:
            self.finish(seq, FinishReason.TIMEOUT)
        self._next_deadline = min(self._deadlines.values(), default=inf)
        return late

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence and give back all that it holds."""
        seq.finish_reason = reason
        del self._seqs[seq.request_id]
        self._deadlines.pop(seq.request_id, None)
        if seq.block_table:
            self._stop_running(seq)
        else:
            self.waiting.remove(seq)
        self._release(seq)

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step and advance ``num_computed`` of everything in it.

        Args:
            now: Seconds; becomes ``first_run`` of sequences that begin to run.
        """
        plan = StepPlan()
        budget = self._schedule_decodes(plan, self.max_num_batched_tokens)
        budget = self._schedule_prefills(plan, budget)
        self._schedule_waiting(plan, budget, now)
        if plan.is_empty and self._release_waiting_runs():
            # Soft prompts held for later sequences left no block for the first.
            self._schedule_waiting(plan, budget, now)
        return plan

    def undo(self, plan: StepPlan) -> None:
        """Take back what was planned and could not be computed: nothing is found in blocks that were not written.

        The sequences of these chunks have to be finished or put off before the next step, and so have those that hold
        these runs.
        """
        for run in plan.key_value_fills:
            run.num_computed = 0
        for chunk in plan.chunks:
            if chunk.run is not None:
                chunk.run.num_computed = chunk.start
            elif chunk.seq is not None:
                self.block_manager.unregister(chunk.seq, chunk.start)

    def put_off(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it is computed again in its turn."""
        self._preempt(seq)

    def holders(self, run: SoftPromptRun) -> list[Sequence]:
        """The sequences that hold a soft prompt's run, running or waiting; of an ensemble the leader."""
        return [
            seq
            for seq in self._seqs.values()
            if any(self._held_runs.get(member.request_id) is run for member in seq.members)
        ]

    def spoil(self, plan: StepPlan, spoiled: Mapping[int, int]) -> tuple[list[Sequence], list[Sequence]]:
        """Have nobody find what a step has written that is not finite.

        Blocks can no longer be found, a soft prompt that was being filled is dropped with its last reference. What
        was written behind such blocks in the same step goes with them, whichever sequence it is of.

        Args:
            plan: The step, just done.
            spoiled: As in ``StepOutput``.

        A sequence that has found such blocks in the same step may be as it should be itself, for a chunk's later
        positions may have spoiled the earlier ones that it shares. It gives its own back, and is computed again.

        Returns:
            Sequences that the caller has to end: those that wrote such blocks by themselves, and those that hold such
            a soft prompt, running or waiting.
        """
        blocks: set[int] = set()
        wrote: set[str] = set()
        for index, chunk in enumerate(plan.chunks):  # nobody reads what a later chunk writes
            is_misled = not blocks.isdisjoint(chunk.block_table)
            if not is_misled and index not in spoiled:
                continue
            first = 0 if is_misled else spoiled[index]
            blocks.update(chunk.block_table[own] for own in chunk.shared if own >= first)
            if chunk.run is not None:
                chunk.run.spoil()
            elif chunk.seq is not None and not is_misled:
                wrote.add(chunk.seq.request_id)
        self.block_manager.withdraw(blocks)
        ended: list[Sequence] = []
        holding: list[Sequence] = []
        for seq in [*self.running, *self.waiting.returned]:
            runs = [self._held_runs.get(member.request_id) for member in seq.members]
            if any(run is not None and not blocks.isdisjoint(run.blocks) for run in runs):
                holding.append(seq)
            elif any(member.request_id in wrote for member in seq.members):
                ended.append(seq)
            elif any(not blocks.isdisjoint(member.block_table) for member in seq.members):
                self._preempt(seq)
        return ended, holding

    def check_integrity(self) -> None:
        """Hold queues, blocks and soft prompts against each other.

        Raises:
            AssertionError: If they disagree; a fault of this package.
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
        self.waiting.check_integrity()
        self.block_manager.check_integrity(
            [(seq, self._held_runs.get(seq.request_id)) for seq in [*running, *waiting]]
        )

    # Inside a step

    def _schedule_decodes(self, plan: StepPlan, budget: int) -> int:
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            members = seq.members
            if budget >= len(members) and all(own.num_computed == own.num_positions - 1 for own in members):
                if not self._make_room(seq):
                    break  # it was the last, and is preempted itself
                for member in members:
                    self._add_chunk(plan, member, 1)
                budget -= len(members)
            index += 1
        return budget

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        for seq in self.running:
            if seq.num_computed < seq.num_positions:
                budget = self._prefill(plan, seq, budget)
        return budget

    def _schedule_waiting(self, plan: StepPlan, budget: int, now: float) -> None:
        filling = {chunk.run.key for chunk in plan.chunks if chunk.run is not None}
        unserved: list[Sequence] = []
        places = self.max_num_seqs - self.num_running
        while budget > 0 and places > 0:
            seq = self.waiting.take()
            if seq is None:
                break
            members = seq.members
            unserved.append(seq)
            if len(members) > places:
                break  # those behind wait, or an ensemble would wait for ever
            has_blocks, budget = self._fill_soft_prompts(plan, members, budget, filling)
            if not has_blocks:
                break  # likewise: no blocks for a soft prompt, and the large would wait for ever
            if not all(self._is_usable(member, filling) for member in members):
                places -= len(members)
                continue
            # One block in reserve for every running sequence keeps an admission from preempting at once.
            admissions = self.block_manager.admit_all(
                [(member, self._held_runs.get(member.request_id)) for member in members], headroom=self.num_running
            )
            if admissions is None:
                break
            unserved.pop()
            places -= len(members)
            plan.block_copies += [admission.copy for admission in admissions if admission.copy is not None]
            if seq.first_run is None:
                seq.first_run = now
                seq.num_cached_tokens = sum(admission.num_cached_tokens for admission in admissions)
                self._deadlines.pop(seq.request_id, None)
            self.waiting.serve(seq)
            insort(self.running, seq, key=_precedence)
            self.num_running += len(members)
            budget = self._prefill(plan, seq, budget)
        for seq in unserved:
            self.waiting.put_back(seq)

    def _prefill(self, plan: StepPlan, seq: Sequence, budget: int) -> int:
        """Compute as much of a sequence as the budget allows; returns what is left of it.

        The members of an ensemble reach their ends in one step, where their logits are needed together.
        """
        members = seq.members
        missing = [member.num_positions - member.num_computed for member in members]
        kept_back = 1 if seq.followers and sum(missing) > budget else 0
        for member, count in zip(members, missing, strict=True):
            num_tokens = min(count - kept_back, budget)
            if num_tokens > 0:
                self._add_chunk(plan, member, num_tokens)
                budget -= num_tokens
        return budget

    def _fill_soft_prompts(
        self, plan: StepPlan, members: tuple[Sequence, ...], budget: int, filling: set[str]
    ) -> tuple[bool, int]:
        """Hold the members' soft prompts and plan what is missing of them.

        Returns:
            Whether each was given blocks, and what is left of the budget.
        """
        for member in members:
            if member.soft_prompt is not None:
                run, used = self._fill_soft_prompt(plan, member, budget, filling)
                budget -= used
                if run is None:
                    return False, budget
        return True, budget

    def _fill_soft_prompt(
        self, plan: StepPlan, seq: Sequence, budget: int, filling: set[str]
    ) -> tuple[SoftPromptRun | None, int]:
        """Hold the sequence's soft prompt and plan what is missing of it; returns it and the budget used."""
        source = seq.soft_prompt
        if source is None:
            return None, 0
        run = self._held_runs.get(seq.request_id)
        if run is None:
            run = self.block_manager.acquire_run(source)
            if run is None:
                return None, 0
            self._held_runs[seq.request_id] = run
        if run.is_filled or run.key in filling:
            return run, 0
        if source.is_key_values:
            plan.key_value_fills.append(run)
            run.num_computed = source.num_virtual_tokens
            return run, 0
        if budget == 0:
            return run, 0
        num_tokens = min(source.num_virtual_tokens - run.num_computed, budget)
        chunk = Chunk(run.blocks, run.num_computed, num_tokens, run=run)
        block_size = self.block_manager.block_size
        chunk.shared = list(range(chunk.start // block_size, self.block_manager.blocks_for(chunk.stop)))
        plan.chunks.append(chunk)
        run.num_computed += num_tokens
        filling.add(run.key)
        return run, num_tokens

    def _is_usable(self, seq: Sequence, filling: set[str]) -> bool:
        """Whether a sequence may follow its soft prompt, which it holds, in this step.

        Full blocks may be read in the step that computes them; a partial last block has to be copied before it.
        """
        if seq.soft_prompt is None:
            return True
        run = self._held_runs[seq.request_id]
        if not run.is_filled:
            return False
        return run.key not in filling or run.source.num_virtual_tokens % self.block_manager.block_size == 0

    def _blocks_to_finish(self, seq: Sequence) -> int:
        """Blocks of one sequence, or one member of an ensemble, at its longest."""
        # The last new token is returned, never fed back, so it needs no slot.
        longest = max(seq.num_positions, seq.num_positions + seq.params.max_tokens - 1)
        return self.block_manager.blocks_to_finish(seq.soft_prompt, longest)

    def _add_chunk(self, plan: StepPlan, seq: Sequence, num_tokens: int) -> None:
        chunk = Chunk(seq.block_table, seq.num_computed, num_tokens, seq=seq)
        plan.chunks.append(chunk)
        seq.num_computed += num_tokens
        chunk.shared = self.block_manager.register(seq, seq.num_computed)

    def _make_room(self, seq: Sequence) -> bool:
        """Find blocks for the next position of a sequence and its followers; False if it had to give up its own."""
        for member in seq.members:
            while not self.block_manager.extend(member, member.num_positions):
                if self._release_waiting_runs():
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                if victim is seq:
                    return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._stop_running(seq)
        self._release(seq)
        self.waiting.resume(seq)
        self.num_preemptions += 1

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.num_running -= len(seq.members)

    def _release_waiting_runs(self) -> bool:
        """Take soft prompts from waiting sequences; they are acquired again in turn. False if none held any."""
        holders = [
            seq
            for seq in self.waiting.returned
            if any(member.request_id in self._held_runs for member in seq.members)
        ]
        for seq in holders:
            self._release(seq)
        return bool(holders)

    def _release(self, seq: Sequence) -> None:
        for member in seq.members:
            self.block_manager.free(member)
            run = self._held_runs.pop(member.request_id, None)
            if run is not None:
                self.block_manager.release_run(run)


def _precedence(seq: Sequence) -> tuple[int, int]:
    """Who keeps its blocks before whom: the most urgent class, and in it who had its turn first."""
    return seq.urgency, -1 if seq.turn is None else seq.turn
