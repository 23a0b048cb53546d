"""What the service tier ``batch`` may take of a step: only what interactive sequences leave.

Batch sequences wait in classes of their own, behind every interactive class and never promoted. Beyond the order of
the queue, two rules keep the first token of an interactive sequence near:

- *Hold.* A step with an interactive text still to be computed has no batch work at all. Decodes of interactive
  sequences share their steps with it.
- *Short steps.* A step computes a bounded number of batch tokens, because an arriving sequence waits for the end of
  the present step. At most half of them are decodes, so that texts go on being computed beside them.

Interactive sequences that lack a slot or blocks preempt batch sequences, the last first. So batch work may wait as
long as interactive work fills the server; it ends when the load falls.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from server.engine.scheduling.fair_queue import FairQueue
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.sequence import Sequence


class BatchTier:
    """Decides in each step whether batch sequences take part, and with how many tokens.

    Args:
        step_tokens: Tokens of batch sequences in one step; at least 1.

    Attributes:
        num_sequences: Batch sequences that wait or run.
        is_held: Whether the present step has no batch work.

    Raises:
        ValueError: If ``step_tokens`` is less than 1.
    """

    def __init__(self, step_tokens: int) -> None:
        if step_tokens < 1:
            raise ValueError(f"batch_step_tokens is {step_tokens}; it has to be at least 1")
        self.num_sequences = 0
        self.is_held = False
        self._step_tokens = step_tokens

    def begin(self, running: SequenceOf[Sequence], waiting: FairQueue) -> None:
        """Decide for a new step whether batch work is held.

        Args:
            running: In order; interactive sequences come first.
            waiting: The queue.
        """
        self.is_held = self.num_sequences > 0 and (waiting.has_interactive or _computes_text(running))

    def num_waiting(self, running: Iterable[Sequence]) -> int:
        """Batch sequences that wait; of an ensemble, the leader."""
        return self.num_sequences - sum(seq.is_batch for seq in running)

    def lift(self) -> bool:
        """Let batch work into a step that would be empty without it; False if it is not held."""
        was_held, self.is_held = self.is_held, False
        return was_held

    def may_run(self, seq: Sequence) -> bool:
        """Whether a sequence takes part in the present step."""
        return not (seq.is_batch and self.is_held)

    def room(self, seq: Sequence, plan: StepPlan, budget: int) -> int:
        """Tokens of the budget that a sequence may take in a step."""
        return min(budget, self._step_tokens - _batch_tokens(plan)) if seq.is_batch else budget

    def may_start(self, seq: Sequence, running: SequenceOf[Sequence]) -> bool:
        """Whether another sequence may start to run beside the running ones."""
        if not seq.is_batch:
            return True
        num_running = sum(len(own.members) for own in reversed(running) if own.is_batch)
        return not num_running or num_running + len(seq.members) <= max(1, self._step_tokens // 2)

    def victim(self, running: SequenceOf[Sequence]) -> Sequence | None:
        """The batch sequence that makes room for an interactive one; None if none runs."""
        # Only while batch work is held: otherwise the victim may have a part in the step already.
        return running[-1] if self.is_held and running and running[-1].is_batch else None


def _computes_text(running: Iterable[Sequence]) -> bool:
    """Whether a running interactive sequence has no first token yet, or computes its text again."""
    for seq in running:
        if seq.is_batch:
            return False
        if any(own.num_computed < own.num_positions - 1 for own in seq.members):
            return True
    return False


def _batch_tokens(plan: StepPlan) -> int:
    return sum(chunk.num_tokens for chunk in plan.chunks if chunk.seq is not None and chunk.seq.is_batch)
