"""Decode steps over tensors at fixed addresses, so that a CUDA graph can replay them.

A decode step of a small model is hundreds of launches, each of which takes the GPU less time than Python needs to
launch it. A CUDA graph records them once and replays them by one call, with the addresses of the recording. So each
step's inputs are written into the same tensors, and batches are padded to a few sizes with one graph each. Padding
rows are sequences of one token in the cache's spare block.

Without graphs, on CPUs too, batches are not padded. The buffers still serve, because only what changed since the last
step is written.
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
"""Rows of the largest graph; larger batches keep the GPU busy without one."""

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device; returns a function that replays it."""


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The model's inputs for a batch of one size, as views of the buffers.

    Attributes:
        input_ids: [1, size] int64.
        position_ids: [1, size] int64.
        metadata: One group of ``size`` rows.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    metadata: AttentionMetadata


class DecodeBuffers:
    """Input ids, positions, slots and block tables of decodes, at fixed addresses.

    All are parts of one tensor, so a step needs one copy from pinned memory. Block tables are stored by column, so
    that the copy covers only the columns in use.

    Args:
        max_rows: Rows of the largest batch.
        max_blocks: Blocks of the longest sequence.
        cache: The cache with the blocks.
    """

    def __init__(self, max_rows: int, max_blocks: int, cache: KVCache) -> None:
        device = cache.tensor.device
        self.max_rows = max_rows
        self._block_size, self._cache = cache.spec.block_size, cache
        host = torch.zeros(3 + max_blocks, max_rows, dtype=torch.int64, pin_memory=pins(device))
        self._host, self._numbers = host, host.numpy()
        self._device = host.to(device)
        self._copied = torch.cuda.Event() if pins(device) else None  # type: ignore[no-untyped-call]
        self._tables: list[list[int]] = [[] for _ in range(max_rows)]

    def batch(self, size: int, width: int | None = None) -> DecodeBatch:
        """The first ``size`` rows, with the first ``width`` blocks of each table; None for all blocks."""
        ids, positions, slots = self._device[:3, :size]
        tables = self._device[3:] if width is None else self._device[3 : 3 + width]
        rows = Rows(0, size, tables[:, :size].t(), positions[:, None])
        return DecodeBatch(ids[None], positions[None], AttentionMetadata(slots, [rows], self._block_size))

    def fill(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], size: int
    ) -> int:
        """Write a step's rows, and padding rows up to ``size``.

        Args:
            token_ids: The token of each row.
            positions: The position of each row.
            tables: The block table of each row, at least up to its position.
            size: Rows of the batch.

        Returns:
            Blocks of the longest sequence.
        """
        if self._copied is not None:
            self._copied.synchronize()  # a step without a new token has not waited for the device
        ids, own_positions, slots = self._numbers[:3]
        count, width, spare = len(token_ids), 1, self._cache.spare_block
        ids[:count], ids[count:size] = token_ids, 0
        own_positions[:count], own_positions[count:size] = positions, 0
        slots[count:size] = spare * self._block_size
        for row in range(size):
            position = positions[row] if row < count else 0
            length = position // self._block_size + 1
            # Compared by value, because the scheduler changes tables in place.
            table = list(tables[row][:length]) if row < count else [spare]
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
        forward: Computes the logits [rows, vocabulary] of a batch without waiting for the device.
        buffers: The buffers of the batches.
        max_rows: Rows of the largest batch.
        record: Records a forward pass.

    Attributes:
        sizes: Rows of the recorded batches, ascending.

    Raises:
        Exception: Of any kind, if a pass cannot be recorded.
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
        # One tensor for all sizes: a step needs one, and separate ones would stay allocated.
        self._logits = torch.empty_like(first)
        # Largest first: the other graphs reuse its memory.
        for size in reversed(self.sizes):
            self._replays[size] = record(_Pass(forward, buffers.batch(size), self._logits[:size]))

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        size: int | None = None,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of decodes, valid until the next call.

        Args:
            token_ids: One for each row; at most as many as the largest size.
            positions: One for each row.
            tables: The block table of each row.
            size: Size of the graph; None for the smallest that is large enough.
        """
        if size is None:
            size = self.sizes[bisect_left(self.sizes, len(token_ids))]
        self._buffers.fill(token_ids, positions, tables, size)
        self._replays[size]()
        return self._logits[: len(token_ids)]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass that writes its logits into ``logits``."""

    forward: Callable[[DecodeBatch], torch.Tensor]
    batch: DecodeBatch
    logits: torch.Tensor

    def __call__(self) -> None:
        self.logits.copy_(self.forward(self.batch))


def batch_sizes(max_rows: int) -> list[int]:
    """Powers of two, the numbers halfway between, and ``max_rows``: at most a third of a batch is padding."""
    sizes = {size for power in range(max_rows.bit_length()) for size in (1 << power, 3 << power >> 1)}
    return sorted({size for size in sizes if size < max_rows} | {max_rows})
