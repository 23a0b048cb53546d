"""Withdraws the blocks of a step that hold values which are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun


def withdraw_spoiled(
    plan: StepPlan,
    spoiled: Mapping[int, int],
    seqs: Iterable[Sequence],
    held_runs: Mapping[str, SoftPromptRun],
    block_manager: BlockManager,
    preempt: Callable[[Sequence], None],
) -> tuple[list[Sequence], list[Sequence]]:
    """Withdraw the non-finite blocks that a step wrote; ``Scheduler.spoil`` describes arguments and result.

    Args:
        plan: The step, just computed.
        spoiled: The first spoiled block of each spoiled chunk, by the chunk's index.
        seqs: The sequences that run, or that wait and had their turn.
        held_runs: The soft prompts that sequences hold, by request id.
        block_manager: Withdraws the blocks.
        preempt: Called with each sequence that read spoiled blocks of another one.
    """
    blocks: set[int] = set()
    wrote: set[str] = set()
    for index, chunk in enumerate(plan.chunks):  # no chunk reads what a later one writes
        is_misled = not blocks.isdisjoint(chunk.block_table)
        if not is_misled and index not in spoiled:
            continue
        first = 0 if is_misled else spoiled[index]
        blocks.update(chunk.block_table[own] for own in chunk.shared if own >= first)
        if chunk.run is not None:
            chunk.run.spoil()
        elif chunk.seq is not None and not is_misled:
            wrote.add(chunk.seq.request_id)
    block_manager.withdraw(blocks)
    ended: list[Sequence] = []
    holding: list[Sequence] = []
    for seq in seqs:
        runs = [held_runs.get(member.request_id) for member in seq.members]
        if any(run is not None and not blocks.isdisjoint(run.blocks) for run in runs):
            holding.append(seq)
        elif any(member.request_id in wrote for member in seq.members):
            ended.append(seq)
        elif any(not blocks.isdisjoint(member.block_table) for member in seq.members):
            preempt(seq)
    return ended, holding
