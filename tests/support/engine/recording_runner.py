"""A fake of the model runner that makes wrong keys and values visible as wrong tokens.

Each slot of each block holds a value that represents its keys and values, and the next token depends on the slots
that are read. So a slot that was not written, was written by another sequence, or was left by a failed pass shows as
a wrong token. A failed pass leaves garbage in all slots that it should write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.sampling.sampler import NOT_FINITE
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.sequence import Sequence
from server.engine.types import StepOutput
from tests.support.engine.harness import VOCABULARY

NAN = -4
"""The content of a slot where the model would have computed NaN, and of the slots that follow it."""


@dataclass
class RecordingRunner:
    """Computes tokens from the slots that it reads, and raises if a sequence or a soft prompt is bad.

    Attributes:
        block_size: Positions in a block.
        fails_from: By request, the position in its text from which on it makes every step raise.
        bad_run: The soft prompt that makes every step that fills it raise.
        nan_every: One value of this many is NaN; None for none.
        raises_late: Whether steps raise when their result is awaited, not when they are launched.
    """

    block_size: int
    fails_from: dict[str, int]
    bad_run: str | None = None
    nan_every: int | None = None
    raises_late: bool = False
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    num_raised: int = 0

    def launch(self, plan: StepPlan, _soft_prompts: object) -> Callable[[], StepOutput]:
        if self._is_bad(plan):
            self.num_raised += 1
            self._fill_with_rubbish(plan)
            if not self.raises_late:
                raise ValueError("bad row")
            return self._fail
        output = self._run(plan)
        return lambda: output

    def _fail(self) -> StepOutput:
        raise ValueError("bad row")

    def _run(self, plan: StepPlan) -> StepOutput:
        for run in plan.key_value_fills:
            for position in range(run.source.num_virtual_tokens):
                self._write(run.blocks, position, hash((run.key, position)))
        for source, destination in plan.block_copies:
            for offset in range(self.block_size):
                self.slots[destination, offset] = self.slots.get((source, offset), -7)
        ends: list[tuple[Sequence, int]] = []
        for chunk in plan.chunks:
            value = self._compute(chunk)
            if chunk.seq is not None and chunk.samples:
                ends.append((chunk.seq, value))
        tokens = []
        for index, (seq, _) in enumerate(ends):
            if not seq.is_follower:
                values = tuple(value for _, value in ends[index : index + len(seq.members)])
                draw = 0.0 if seq.request.params.is_greedy else seq.draw()
                tokens.append(NOT_FINITE if NAN in values else hash((values, draw)) % VOCABULARY)
        return StepOutput(tokens, spoiled=self._spoiled(plan))

    def _spoiled(self, plan: StepPlan) -> dict[int, int]:
        spoiled: dict[int, int] = {}
        for number, chunk in enumerate(plan.chunks):
            for index in chunk.shared:
                stop = min(chunk.stop, (index + 1) * self.block_size)
                if NAN in [self._read(chunk.block_table, at) for at in range(index * self.block_size, stop)]:
                    spoiled.setdefault(number, index)
        return spoiled

    def _is_bad(self, plan: StepPlan) -> bool:
        runs = [*plan.key_value_fills, *(chunk.run for chunk in plan.chunks if chunk.run is not None)]
        if any(run.key == self.bad_run for run in runs):
            return True
        return any(
            chunk.seq is not None
            and chunk.stop
            > chunk.seq.num_virtual_tokens + self.fails_from.get(chunk.seq.request_id.partition("/")[0], 10**9)
            for chunk in plan.chunks
        )

    def _fill_with_rubbish(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.samples and not chunk.seq.is_follower:
                chunk.seq.draw()
        for run in plan.key_value_fills:
            for position in range(run.source.num_virtual_tokens):
                self._write(run.blocks, position, -1)
        for _, destination in plan.block_copies:
            for offset in range(self.block_size):
                self.slots[destination, offset] = -2
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.stop):
                self._write(chunk.block_table, position, -3)

    def _compute(self, chunk: Chunk) -> int:
        value = self._read(chunk.block_table, chunk.start - 1) if chunk.start else 0
        for position in range(chunk.start, chunk.stop):
            source = chunk.soft_prompt
            if source is not None and position < source.num_virtual_tokens:
                value = self._value(value, source.identity, position)
            elif chunk.seq is not None:
                value = self._value(value, chunk.seq.token_ids[position - chunk.seq.num_virtual_tokens])
            self._write(chunk.block_table, position, value)
        return value

    def _value(self, before: int, *content: object) -> int:
        value = hash((before, *content))
        return NAN if before == NAN or (self.nan_every is not None and value % self.nan_every == 0) else value

    def _read(self, table: list[int], position: int) -> int:
        return self.slots.get((table[position // self.block_size], position % self.block_size), -9)

    def _write(self, table: list[int], position: int, value: int) -> None:
        self.slots[table[position // self.block_size], position % self.block_size] = value
