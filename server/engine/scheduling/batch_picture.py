"""The running batch as plain numbers, for people who watch it. Pure logic that changes nothing.

Nothing here runs unless a picture is taken, which ``PictureLease`` does while somebody watches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from server.engine.messages import (
    MAX_HOST_DIGESTS,
    MAX_MAPPED_BLOCKS,
    AdapterPicture,
    BatchPicture,
    BlockState,
    Phase,
    RunPicture,
    SequencePicture,
)
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.pending import PendingSequences
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun, run_key

_FREE, _IDLE, _USED, _SHARED = (
    int(state) for state in (BlockState.FREE, BlockState.IDLE, BlockState.USED, BlockState.SHARED)
)
"""As plain integers: a map is made of thousands between two steps, and to read a member of an enumeration is slow."""

MAX_ROWS = 1024
"""Maximum number of sequences in a picture; running ones come first."""


def take_picture(
    scheduler: Scheduler, pending: PendingSequences, *, step: int, now: float, host: Iterable[str] = ()
) -> BatchPicture:
    """Describe the batch between two steps; it holds no text and no name.

    Args:
        scheduler: Has the sequences and their blocks.
        pending: The sequences that cannot be scheduled yet.
        step: Number of steps so far.
        now: Seconds of the engine's clock.
        host: Digests of what is in host memory; the first are shown.
    """
    blocks = scheduler.block_manager
    memory = scheduler.adapters.memory
    rows: list[SequencePicture] = []
    for seq, reason in _sequences(scheduler, pending):
        if len(rows) >= MAX_ROWS:
            break
        rows += [_row(member, seq, blocks, reason, now) for member in seq.members]
    return BatchPicture(
        step=step,
        sequences=rows[:MAX_ROWS],
        runs=[_run(run) for run in blocks.runs.values()],
        adapters=[] if memory is None else [_adapter(*entry) for entry in memory.entries()],
        host=list(islice(host, MAX_HOST_DIGESTS)),
        num_blocks=blocks.num_blocks,
        num_used_blocks=blocks.num_blocks - blocks.num_available,
        num_idle_blocks=blocks.num_cached,
        block_map=_map(blocks),
    )


def _sequences(scheduler: Scheduler, pending: PendingSequences) -> Iterator[tuple[Sequence, str | None]]:
    """All sequences, running ones first, with the reason of those that wait."""
    for seq in scheduler.running:
        yield seq, None
    returned = {seq.request_id for seq in scheduler.waiting.returned}
    has_place = scheduler.num_running < scheduler.max_num_seqs
    for seq in scheduler.waiting:
        if seq.request_id not in returned:
            yield seq, "blocks" if has_place else "place"
        elif seq.first_run is not None:
            yield seq, "preempted"
        else:
            yield seq, "soft_prompt" if _lacks_run(seq, scheduler.block_manager) else "adapter"
    for seq, needs in pending:
        yield seq, "soft_prompt" if any(isinstance(need, str) for need in needs) else "grammar"


def _lacks_run(seq: Sequence, blocks: BlockManager) -> bool:
    keys = [
        run_key(member.request.soft_prompt, member.request.adapter)
        for member in seq.members
        if member.request.soft_prompt is not None
    ]
    return any(key not in blocks.runs or not blocks.runs[key].is_filled for key in keys)


def _row(member: Sequence, leader: Sequence, blocks: BlockManager, reason: str | None, now: float) -> SequencePicture:
    request = member.request
    if reason is not None:
        phase = Phase.WAITING
    elif member.num_new_tokens and member.num_computed >= member.num_positions - 1:
        phase = Phase.DECODE
    else:
        phase = Phase.PREFILL
    num_before = member.num_virtual_tokens // blocks.block_size if member.block_table else 0
    num_shared = blocks.num_shared(member.block_table[num_before:])
    return SequencePicture(
        request_id=leader.request_id,
        tenant=request.salt,
        phase=phase,
        run=None if request.soft_prompt is None else run_key(request.soft_prompt, request.adapter),
        is_batch=request.is_batch,
        num_virtual_tokens=member.num_virtual_tokens,
        num_text_tokens=member.num_prompt_tokens,
        num_new_tokens=member.num_new_tokens,
        num_computed=member.num_computed,
        num_prompt_blocks=num_before,
        num_shared_blocks=num_shared,
        num_own_blocks=len(member.block_table) - num_before - num_shared,
        age_seconds=round(now - member.arrival, 3),
        reason=reason,
    )


def _run(run: SoftPromptRun) -> RunPicture:
    return RunPicture(
        key=run.key,
        digest=run.source.digest,
        task_id=run.source.task_id,
        num_blocks=len(run.blocks),
        num_users=run.ref_count,
        state=_run_state(run),
    )


def _adapter(digest: str, num_users: int, is_loaded: bool) -> AdapterPicture:
    return AdapterPicture(digest=digest, num_users=num_users, is_loaded=is_loaded)


def _run_state(run: SoftPromptRun) -> str:
    if run.is_filled:
        return "used" if run.ref_count else "idle"
    return "loading"


def _map(blocks: BlockManager) -> bytes:
    """The state of each block, or of every n-th if there are more than ``MAX_MAPPED_BLOCKS``."""
    stride = -(-blocks.num_blocks // MAX_MAPPED_BLOCKS)
    states = {
        "used": BlockState.PROMPT_USED,
        "idle": BlockState.PROMPT_IDLE,
        "loading": BlockState.PROMPT_LOADING,
    }
    found = bytearray(_text_state(*use) for use in blocks.uses(stride))
    for run in blocks.runs.values():
        for block in run.blocks:
            if block % stride == 0:
                found[block // stride] = states[_run_state(run)]
    return bytes(found)


def _text_state(ref_count: int, is_cached: bool) -> int:
    if ref_count == 0:  # most blocks
        return _IDLE if is_cached else _FREE
    return _USED if ref_count == 1 else _SHARED
