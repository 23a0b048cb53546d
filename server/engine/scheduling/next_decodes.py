"""Plans the decodes of the next step while a device computes the present one.

It is assumed that every sequence that samples goes on by one token, unless its length ends it. When the result
arrives, ``Scheduler.schedule`` drops the sequences that ended or were preempted, and plans everything else: which
sequences are admitted and preempted depends on the blocks that ended sequences release, and which blocks may be found
on the check of those that the step wrote.

So the plans are the same as without planning ahead, but for the ids of blocks. Only free blocks are taken: an idle
block that is evicted early, or a sequence that is preempted early, might have been spared. A sequence keeps a block
that it took for a token which it then does not need: it would have taken it next, or it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import Chunk
from server.engine.scheduling.sequence import Sequence


def next_decodes(running: SequenceOf[Sequence], block_manager: BlockManager) -> list[Chunk] | None:
    """The decodes of the step after the one that was scheduled last, with blocks for their positions.

    Args:
        running: The running sequences in order; of an ensemble, the leader.
        block_manager: Its free blocks may be taken.

    Returns:
        A chunk of one position for each sequence; None if too few blocks are free.
    """
    chunks: list[Chunk] = []
    for seq in running:
        if not _decodes_next(seq):
            continue
        for member in seq.members:
            if not block_manager.extend(member, member.num_computed + 1, evicts=False):
                return None
            chunks.append(Chunk(member.block_table, member.num_computed, 1, seq=member))
    return chunks


def _decodes_next(seq: Sequence) -> bool:
    """Whether one position of each member will be missing, if the present step does not end the sequence."""
    num_missing = {member.num_positions - member.num_computed for member in seq.members}
    if num_missing == {0}:  # it samples in the present step
        return seq.num_new_tokens + 1 < seq.request.params.max_tokens
    return num_missing == {1}
