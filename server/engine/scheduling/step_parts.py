"""Retries a failed step in parts, to find the parts that fail and compute the others.

A sequence that fails must not end the other sequences of its step. So the step's parts are run in halves, and halves
that fail are halved again, until a single part fails. A part is one sequence with its followers, or the filling of
one soft prompt. With one failing part of n this takes about 2 log n passes over at most twice the step's tokens; if
all parts fail, 2 n passes.

A step can be repeated because it changes nothing but keys and values. Those are written to the same slots again;
blocks are copied again from unchanged sources; a sequence keeps the random number drawn for its next token; and
grammars, penalties and logprobs advance only with the tokens of the step that succeeds.

Parts depend on each other: a sequence may read blocks that another part of the step writes (a soft prompt's, or a
shared prefix). Parts run in the order of the plan, where writers precede readers. A part whose blocks could not be
written does not run; its sequence is returned to the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.types import StepOutput

RunPlan = Callable[[StepPlan], StepOutput]


@dataclass(slots=True)
class Part:
    """The smallest unit that can be run alone.

    Attributes:
        owner: A sequence (of an ensemble, the leader), or the soft prompt that is filled.
        plan: Its part of the step.
    """

    owner: Sequence | SoftPromptRun
    plan: StepPlan = field(default_factory=StepPlan)


@dataclass(slots=True)
class Retry:
    """The result of a step in parts.

    Attributes:
        plan: The parts that were computed, in order.
        output: Their output.
        failed: The parts that failed alone, each with its exception.
        unserved: Sequences that read blocks which could not be written; not at fault.
        undone: The plan of the failed and the unserved parts, which is not written.
    """

    plan: StepPlan = field(default_factory=StepPlan)
    output: StepOutput = field(default_factory=lambda: StepOutput([]))
    failed: list[tuple[Part, Exception]] = field(default_factory=list)
    unserved: list[Sequence] = field(default_factory=list)
    undone: StepPlan = field(default_factory=StepPlan)


def retry_in_parts(
    plan: StepPlan,
    running: SequenceOf[Sequence],
    run: RunPlan,
    error: Exception,
    *,
    block_size: int,
    on_error: Callable[[Exception], None],
) -> Retry:
    """Find the parts of a step that fail, and compute the others.

    Args:
        plan: The step, which failed as a whole.
        running: All sequences with blocks; of an ensemble, the leader.
        run: Computes a plan, or raises.
        error: The exception of the whole step.
        block_size: Positions in a block.
        on_error: Called with each exception of ``run``; it raises if no further pass is possible.

    Raises:
        Exception: Of ``on_error``.
    """
    search = _Search(run, block_size, on_error)
    search.divide(_parts(plan, running, block_size), error)
    search.set_aside_readers(running)
    return search.retry


class _Search:
    def __init__(self, run: RunPlan, block_size: int, on_error: Callable[[Exception], None]) -> None:
        self.retry = Retry()
        self._run = run
        self._block_size = block_size
        self._on_error = on_error
        self._unwritten: set[int] = set()

    def divide(self, parts: list[Part], error: Exception) -> None:
        """Compute parts that failed together."""
        for part in parts:
            if isinstance(part.owner, Sequence):
                part.owner.keep_draw()
        if len(parts) == 1:
            self.retry.failed.append((parts[0], error))
            self._undo(parts[0])
            return
        middle = len(parts) // 2
        for half in (parts[:middle], parts[middle:]):
            able = [part for part in half if not self._set_aside(part)]
            if able:
                self._try(able)

    def set_aside_readers(self, running: Iterable[Sequence]) -> None:
        """Find the sequences without a part in the step that have blocks which were not written."""
        known = {id(part.owner) for part, _ in self.retry.failed} | {id(seq) for seq in self.retry.unserved}
        for seq in running:
            if id(seq) not in known and self._reads_unwritten(seq):
                self.retry.unserved.append(seq)

    def _try(self, parts: list[Part]) -> None:
        plan = _joined(part.plan for part in parts)
        try:
            output = self._run(plan)
        except Exception as error:
            self._on_error(error)
            self.divide(parts, error)
        else:
            self._take(plan, output)

    def _take(self, plan: StepPlan, output: StepOutput) -> None:
        so_far, num_chunks = self.retry.output, len(self.retry.plan.chunks)
        self.retry.plan = _joined([self.retry.plan, plan])
        self.retry.output = StepOutput(
            so_far.tokens + output.tokens,
            so_far.logprobs + (output.logprobs or [None] * len(output.tokens)),
            so_far.prompt_logprobs | output.prompt_logprobs,
            so_far.class_logits | output.class_logits,
            so_far.spoiled | {num_chunks + number: first for number, first in output.spoiled.items()},
        )

    def _set_aside(self, part: Part) -> bool:
        """Whether a part reads blocks that could not be written; if so, remove it from the step."""
        if not isinstance(part.owner, Sequence):
            return False
        sources = {source for source, _ in part.plan.block_copies}
        if not (self._reads_unwritten(part.owner) or sources & self._unwritten):
            return False
        self.retry.unserved.append(part.owner)
        self._undo(part)
        return True

    def _reads_unwritten(self, seq: Sequence) -> bool:
        return any(not self._unwritten.isdisjoint(member.block_table) for member in seq.members)

    def _undo(self, part: Part) -> None:
        self.retry.undone = _joined([self.retry.undone, part.plan])
        self._unwritten |= _written(part.plan, self._block_size)


def _parts(plan: StepPlan, running: SequenceOf[Sequence], block_size: int) -> list[Part]:
    """A step's parts: fills of keys and values first, then the others in the order of their first chunks."""
    leaders = {member.request_id: leader for leader in running for member in leader.members}
    parts: dict[str, Part] = {}

    def part_of(owner: Sequence | SoftPromptRun) -> Part:
        name = f"sequence {owner.request_id}" if isinstance(owner, Sequence) else f"soft prompt {owner.key}"
        return parts.setdefault(name, Part(owner))

    for run in plan.key_value_fills:
        part_of(run).plan.key_value_fills.append(run)
    for chunk in plan.chunks:
        part_of(_owner(chunk, leaders)).plan.chunks.append(chunk)
    # A copy's destination is the block in which a sequence's text begins. Other sequences find that block by its hash
    # only after its first owner has a chunk in it, and that chunk precedes theirs.
    begun = [member for part in parts.values() if isinstance(part.owner, Sequence) for member in part.owner.members]
    owners: dict[int, Sequence] = {}
    for member in [*begun, *(member for leader in running for member in leader.members)]:
        shared = member.num_virtual_tokens // block_size
        if shared < len(member.block_table):
            owners.setdefault(member.block_table[shared], leaders[member.request_id])
    for copy in plan.block_copies:
        part_of(owners[copy[1]]).plan.block_copies.append(copy)
    return list(parts.values())


def _owner(chunk: Chunk, leaders: dict[str, Sequence]) -> Sequence | SoftPromptRun:
    if chunk.seq is not None:
        return leaders[chunk.seq.request_id]
    if chunk.run is None:
        raise AssertionError("a chunk has neither a sequence nor a soft prompt")
    return chunk.run


def _written(plan: StepPlan, block_size: int) -> set[int]:
    """The blocks that a plan writes to."""
    blocks = {block for run in plan.key_value_fills for block in run.blocks}
    blocks |= {destination for _, destination in plan.block_copies}
    for chunk in plan.chunks:
        blocks.update(chunk.block_table[chunk.start // block_size : -(-chunk.stop // block_size)])
    return blocks


def _joined(plans: Iterable[StepPlan]) -> StepPlan:
    whole = StepPlan()
    for plan in plans:
        whole.key_value_fills += plan.key_value_fills
        whole.block_copies += plan.block_copies
        whole.chunks += plan.chunks
    return whole
