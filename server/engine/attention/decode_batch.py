"""Decode steps over tensors that stay where they are, so that a CUDA graph can replay them.

A decode step of a small model is hundreds of launches that each take the GPU less time than Python needs for them. A
CUDA graph is the same launches recorded once and replayed by one call. It reads and writes the addresses that it was
recorded with: so a step's inputs are written into the same tensors, and batches are filled up to a few sizes, for
each of which there is one graph. Rows that only fill up are sequences of one token in the cache's spare block.

Where nothing is recorded, on CPUs too, batches are as large as they are, and decodes are still laid out here: only
what has changed since the step before is written, which is quicker than to lay everything out anew.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from server.engine.attention.backend import AttentionMetadata, Rows
from server.engine.attention.kv_cache import KVCache
from server.engine.attention.transfers import pins

logger = logging.getLogger(__name__)

MAX_ROWS = 512
"""Rows of the largest graph; larger batches keep the GPU busy long enough without one."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device, and returns what does it again."""


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """What the model is given for a batch of one size; all are views of the buffers.

    Attributes:
        input_ids: [1, size] int64.
        position_ids: [1, size] int64.
        metadata: One group of ``size`` rows.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    metadata: AttentionMetadata


class DecodeBuffers:
    """Input ids, positions, slots and block tables of decodes, each in one place for as long as the server runs.

    All are parts of one tensor, so a step is one copy from pinned memory, of as much as it uses: block tables are
    kept by columns, all sequences' first blocks first.

    Args:
        max_rows: Rows of the largest batch.
        max_blocks: Blocks of the longest sequence.
        cache: Whose blocks they are.

    Attributes:
        max_rows: As given.
    """

    def __init__(self, max_rows: int, max_blocks: int, cache: KVCache) -> None:
        device = cache.tensor.device
        self.max_rows = max_rows
        self._block_size, self._spare = cache.spec.block_size, cache.spare_block
        host = torch.zeros(3 + max_blocks, max_rows, dtype=torch.int64, pin_memory=pins(device))
        self._host, self._numbers = host, host.numpy()
        self._device = host.to(device)
        self._copied = torch.cuda.Event() if pins(device) else None  # type: ignore[no-untyped-call]
        self._tables: list[list[int]] = [[] for _ in range(max_rows)]

    def batch(self, size: int, width: int | None = None) -> DecodeBatch:
        """The first ``size`` rows, with the first ``width`` blocks of each; all of them where it is None."""
        ids, positions, slots = self._device[:3, :size]
        tables = self._device[3:] if width is None else self._device[3 : 3 + width]
        rows = Rows(0, size, tables[:, :size].t(), positions[:, None])
        return DecodeBatch(ids[None], positions[None], AttentionMetadata(slots, [rows], self._block_size))

    def fill(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], size: int
    ) -> int:
        """Write a step's rows, and rows that fill up.

        Args:
            token_ids: The token of each row.
            positions: Its position.
            tables: Its sequence's blocks, at least up to that position.
            size: Rows to have in all.

        Returns:
            Blocks of the longest sequence.
        """
        if self._copied is not None:
            self._copied.synchronize()  # a step that chose no token has not waited for the device
        ids, own_positions, slots = self._numbers[:3]
        count, width = len(token_ids), 1
        ids[:count], ids[count:size] = token_ids, 0
        own_positions[:count], own_positions[count:size] = positions, 0
        slots[count:size] = self._spare * self._block_size
        for row in range(size):
            position = positions[row] if row < count else 0
            length = position // self._block_size + 1
            # Compared, not followed: whoever changes a table in place need not know of this.
            table = list(tables[row][:length]) if row < count else [self._spare]
            if table != self._tables[row]:
                self._numbers[3 : 3 + length, row] = table
                self._tables[row] = table
            if row < count:
                slots[row] = table[-1] * self._block_size + position % self._block_size
            width = max(width, length)
        if self._device is not self._host:
            self._device[: 3 + width].copy_(self._host[: 3 + width], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return width


class DecodeGraphs:
    """Replays a model's forward pass over decodes.

    Args:
        forward: Logits [rows, vocabulary] of a batch, computed without waiting for the device.
        buffers: Where batches are.
        max_rows: Rows of the largest.
        record: Records a forward pass.

    Attributes:
        sizes: Rows of the batches that there are graphs for, ascending.

    Raises:
        Exception: Whatever the model or CUDA raises where a pass cannot be recorded.
    """

    def __init__(
        self,
        forward: Callable[[DecodeBatch], torch.Tensor],
        buffers: DecodeBuffers,
        max_rows: int,
        record: Recorder,
    ) -> None:
        self.sizes = batch_sizes(max_rows)
        self._buffers = buffers
        self._replays: dict[int, Callable[[], None]] = {}
        buffers.fill([], [], [], self.sizes[-1])
        first = forward(buffers.batch(self.sizes[-1]))
        # One for all sizes: each graph's own would be kept for ever, and a step reads one of them.
        self._logits = torch.empty_like(first)
        # The largest first: the others find room in the memory that it has taken.
        for size in reversed(self.sizes):
            self._replays[size] = record(_Pass(forward, buffers.batch(size), self._logits[:size]))

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        size: int | None = None,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of decodes; they stay until the next call.

        Args:
            token_ids: As in ``DecodeBuffers.fill``; so are the next two. No more than the largest size.
            positions: See above.
            tables: See above.
            size: Which graph to use; None takes the smallest that holds them.
        """
        if size is None:
            size = self.sizes[bisect_left(self.sizes, len(token_ids))]
        self._buffers.fill(token_ids, positions, tables, size)
        self._replays[size]()
        return self._logits[: len(token_ids)]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass into a part of a tensor."""

    forward: Callable[[DecodeBatch], torch.Tensor]
    batch: DecodeBatch
    logits: torch.Tensor

    def __call__(self) -> None:
        self.logits.copy_(self.forward(self.batch))


def batch_sizes(max_rows: int) -> list[int]:
    """Powers of two and what lies halfway between, up to ``max_rows`` and with it: at most a third fills up."""
    sizes = {size for power in range(max_rows.bit_length()) for size in (1 << power, 3 << power >> 1)}
    return sorted({size for size in sizes if size < max_rows} | {max_rows})
