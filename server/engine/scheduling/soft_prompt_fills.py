"""Plans how the soft prompts of waiting sequences get onto the device, and holds their blocks for the sequences."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.types import SoftPromptSource


class SoftPromptFills:
    """The runs of blocks that sequences hold, and the fills of those that are not complete.

    Args:
        block_manager: Has the blocks.
        step_fill_tokens: As of ``Scheduler``.

    Attributes:
        held: The run of each sequence that holds one, by request id.
    """

    def __init__(self, block_manager: BlockManager, step_fill_tokens: int | None) -> None:
        self.held: dict[str, SoftPromptRun] = {}
        self._block_manager = block_manager
        self._step_fill_tokens = step_fill_tokens

    def add(
        self, plan: StepPlan, members: Iterable[Sequence], budget: int, filling: set[str], num_running: int
    ) -> tuple[bool, int]:
        """Acquire the soft prompts of a sequence and its followers, and plan their missing positions.

        Args:
            plan: The step; fills, loads and chunks are added to it.
            members: The sequence and its followers.
            budget: Tokens that the step may still compute.
            filling: Keys of the runs that the step computes; the new ones are added.
            num_running: Number of running sequences.

        Returns:
            Whether every soft prompt has blocks, and the remaining budget.
        """
        for member in members:
            source = member.request.soft_prompt
            if source is None:
                continue
            run = self._acquire(plan, member, source, num_running)
            if run is None:
                return False, budget
            budget -= self._fill(plan, run, budget, filling)
        return True, budget

    def release(self, name: str) -> None:
        """Release the run of a sequence, if it holds one."""
        run = self.held.pop(name, None)
        if run is not None:
            self._block_manager.release_run(run)

    def _acquire(
        self, plan: StepPlan, seq: Sequence, source: SoftPromptSource, num_running: int
    ) -> SoftPromptRun | None:
        run = self.held.get(seq.request_id)
        if run is None:
            # As for an admission: running sequences must not be stopped by blocks that cannot be taken for a while.
            headroom = num_running if self._is_loaded_beside(plan, source) else 0
            run = self._block_manager.acquire_run(source, seq.request.adapter, headroom)
            if run is not None:
                self.held[seq.request_id] = run
        return run

    def _fill(self, plan: StepPlan, run: SoftPromptRun, budget: int, filling: set[str]) -> int:
        """Plan the missing positions of a run; returns the number of tokens that the step computes for it."""
        if run.is_filled or run.is_loading or run.key in filling:
            return 0
        source = run.source
        if self._is_loaded_beside(plan, source):
            plan.loads.append(run)
            run.is_loading = True
            return 0
        if source.is_key_values:
            plan.key_value_fills.append(run)
            run.num_computed = source.num_virtual_tokens
            return 0
        num_tokens = min(source.num_virtual_tokens - run.num_computed, budget)
        if num_tokens == 0:
            return 0
        chunk = Chunk(run.blocks, run.num_computed, num_tokens, run=run)
        block_size = self._block_manager.block_size
        chunk.shared = list(range(chunk.start // block_size, self._block_manager.blocks_for(chunk.stop)))
        plan.chunks.append(chunk)
        run.num_computed += num_tokens
        filling.add(run.key)
        return num_tokens

    def _is_loaded_beside(self, plan: StepPlan, source: SoftPromptSource) -> bool:
        """Whether a soft prompt is too large for the copies of a step."""
        if self._step_fill_tokens is None or not source.is_key_values:
            return False
        num_copied = sum(run.source.num_virtual_tokens for run in plan.key_value_fills)
        return num_copied + source.num_virtual_tokens > self._step_fill_tokens
