"""Copies of large soft prompts into their blocks, beside the steps.

A prefix of thousands of keys and values is hundreds of megabytes. A step that copied it would stall every running
sequence, so a thread copies it in pieces, on a stream of its own. A piece is copied into pinned memory, from there to
the device, and there into its slots. Two pieces of pinned memory take turns: the thread fills one while the device
reads the other.

The copies wait for the steps that were queued before the load began, because those may still use the blocks. The load
ends when the device has made the copies, so later steps need not wait for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from server.engine.attention.kv_cache import KVCache
from server.engine.attention.transfers import CopyStream, Mark, pins
from server.engine.background_jobs import BackgroundJobs
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun

PIECE_BYTES = 4 * 2**20
"""Bytes of a piece. The copies of a step may queue behind two pieces, which take about 0.3 ms over PCIe 4."""

STEP_FILL_BYTES = PIECE_BYTES
"""Bytes of keys and values that a step copies itself.

So little delays the step by less than its sequence would lose by waiting for the next step.
"""

NUM_STAGED = 2
"""Pieces in pinned memory."""


class BlockLoads:
    """Copies keys and values from the host into blocks, one soft prompt at a time.

    All methods are called from the engine's thread.

    Args:
        cache: The blocks.
        stream: Where the copies are queued; None if each step makes its copies itself.
        on_ended: Called from the copying thread after each load, to wake the engine.

    Attributes:
        step_fill_tokens: Virtual tokens that a step copies itself; None for all.
    """

    def __init__(self, cache: KVCache, stream: CopyStream | None, on_ended: Callable[[], None]) -> None:
        self._cache, self._stream = cache, stream
        self._runs: dict[str, SoftPromptRun] = {}
        self._jobs = BackgroundJobs[str, bool]("block-loads", on_ended=on_ended)
        self.step_fill_tokens: int | None = None
        if stream is not None:
            spec, device = cache.spec, cache.tensor.device
            self.step_fill_tokens = STEP_FILL_BYTES // spec.token_bytes
            self._piece = max(1, PIECE_BYTES // spec.token_bytes)
            shape = (NUM_STAGED, self._piece, spec.token_width)
            # Allocated once: pinning memory takes long, and stops other calls of the driver.
            self._staged = torch.empty(shape, dtype=spec.dtype, pin_memory=pins(device)).unbind()
            self._arrived = torch.empty(shape[1:], dtype=spec.dtype, device=device)

    def __len__(self) -> int:
        """Loads that ``end`` has not ended yet."""
        return len(self._runs)

    def start(self, plan: StepPlan, soft_prompts: SoftPromptLoader) -> None:
        """Start the loads of a plan. Each stops early when its run has no references any more.

        Args:
            plan: A new plan; nothing else writes to the blocks of its loads until ``end``.
            soft_prompts: Has the rows.
        """
        for run in plan.loads:
            if self._stream is None:
                raise AssertionError("a soft prompt is loaded beside the steps of a device without a copy stream")
            rows, before = soft_prompts.rows(run.source), self._stream.mark()
            self._runs[run.key] = run
            self._jobs.submit(run.key, partial(self._copy, self._stream, run, rows, before))

    def end(self, scheduler: Scheduler) -> list[tuple[list[Sequence], BaseException]]:
        """Let the sequences start whose soft prompts have been copied.

        Returns:
            For each load that failed, the sequences that wait for it, which the caller has to end, and the error.
        """
        failed: list[tuple[list[Sequence], BaseException]] = []
        for key, result in self._jobs.take_ended():
            run = self._runs.pop(key)
            is_filled = not isinstance(result, BaseException) and result
            if isinstance(result, BaseException):
                failed.append((scheduler.holders(run), result))
            scheduler.block_manager.end_load(run, is_filled=is_filled)
        return failed

    def close(self) -> None:
        """Stop the load in progress, and end the thread."""
        self._jobs.close()

    def _copy(
        self, stream: CopyStream, run: SoftPromptRun, rows: torch.Tensor, before: Mark, cancelled: threading.Event
    ) -> bool:
        """Copy a soft prompt, in the thread; returns whether all of it was copied."""
        with torch.inference_mode(), stream.after(before):
            try:
                return self._queue_pieces(stream, run, rows, cancelled)
            finally:
                # After an error, too: the blocks and the staged pieces are used again.
                stream.mark().synchronize()

    def _queue_pieces(
        self, stream: CopyStream, run: SoftPromptRun, rows: torch.Tensor, cancelled: threading.Event
    ) -> bool:
        """Queue the copies of all pieces, unless the load is no longer wanted; returns whether it was."""
        slots = self._cache.slots(run.blocks)
        read: list[Mark] = []
        for index, piece in enumerate(torch.split(rows, self._piece)):
            # References are released in the engine's thread. Seeing that late costs a piece.
            if run.ref_count == 0 or cancelled.is_set():
                return False
            if index >= NUM_STAGED:
                read[index - NUM_STAGED].synchronize()
            staged, arrived = self._staged[index % NUM_STAGED][: len(piece)], self._arrived[: len(piece)]
            staged.copy_(piece)
            arrived.copy_(staged, non_blocking=True)
            read.append(stream.mark())
            first = index * self._piece
            self._cache.write(slots[first : first + len(piece)], arrived)
        return True
