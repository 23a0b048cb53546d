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

_SLOTS = 3
"""Lines of the buffers with ids, positions and slots."""

_TABLES = 5
"""First line of the tables, behind two with changes of them: where (line times rows, plus row), and which block."""

WHOLE_COPY_BYTES = 64 * 1024
"""Tables up to this size are copied whole when they change: that takes less time than to launch a kernel."""

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
    that a copy of all tables covers only the columns in use.

    Only changes of the tables are written and copied. A table is a list that only grows while it is used, so the same
    list in the same row needs no comparison.

    Args:
        max_rows: Rows of the largest batch.
        max_blocks: Blocks of the longest sequence.
        cache: The cache with the blocks.
    """

    def __init__(self, max_rows: int, max_blocks: int, cache: KVCache) -> None:
        device = cache.tensor.device
        self.max_rows = max_rows
        self._block_size, self._cache = cache.spec.block_size, cache
        host = torch.zeros(_TABLES + max_blocks, max_rows, dtype=torch.int64, pin_memory=pins(device))
        self._host, self._numbers = host, host.numpy()
        self._device = host.to(device)
        self._copied = torch.cuda.Event() if pins(device) else None  # type: ignore[no-untyped-call]
        self._padding = [cache.spare_block]
        self._tables: list[Sequence[int]] = [[] for _ in range(max_rows)]
        self._lengths = [0] * max_rows
        """Blocks of each row's table that are written."""

    def batch(self, size: int, width: int | None = None) -> DecodeBatch:
        """The first ``size`` rows, with the first ``width`` blocks of each table; None for all blocks."""
        ids, positions, slots = self._device[:_SLOTS, :size]
        tables = self._device[_TABLES:] if width is None else self._device[_TABLES : _TABLES + width]
        rows = Rows(0, size, tables[:, :size].t(), positions[:, None])
        return DecodeBatch(ids[None], positions[None], AttentionMetadata(slots, [rows], self._block_size))

    def fill(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], size: int
    ) -> int:
        """Write a step's rows, and padding rows up to ``size``.

        Args:
            token_ids: The token of each row.
            positions: The position of each row.
            tables: The block table of each row, at least up to its position. A list that was passed before may have
                become longer, but holds the same blocks.
            size: Rows of the batch.

        Returns:
            Blocks of the longest sequence.
        """
        if self._copied is not None:
            self._copied.synchronize()  # a step without a new token has not waited for the device
        ids, own_positions, slots = self._numbers[:_SLOTS]
        count = len(token_ids)
        lengths = [position // self._block_size + 1 for position in positions]
        ids[:count], ids[count:size] = token_ids, 0
        own_positions[:count], own_positions[count:size] = positions, 0
        slots[:count] = [table[length - 1] for table, length in zip(tables, lengths, strict=True)]
        slots[:count] *= self._block_size
        slots[:count] += own_positions[:count] % self._block_size
        slots[count:size] = self._cache.spare_block * self._block_size
        num_padding = size - count
        if self._padding[0] != self._cache.spare_block:  # the cache was resized
            self._padding = [self._cache.spare_block]
        changes = self._write_tables([*tables, *[self._padding] * num_padding], [*lengths, *[1] * num_padding])
        width = max(lengths, default=1)
        if self._device is not self._host:
            self._copy(width, changes)
        if self._copied is not None:
            self._copied.record()
        return width

    def _write_tables(self, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """Write the first blocks of each row's table on the host, as far as they changed.

        Returns:
            The changes: (row, first block, end).
        """
        changes: list[tuple[int, int, int]] = []
        # When a sequence ends, the rows behind it move.
        others = [row for row, table in enumerate(tables) if self._tables[row] is not table]
        if others:
            known = {id(table): row for row, table in enumerate(self._tables)}
            moves = [(row, known[id(tables[row])]) for row in others if id(tables[row]) in known]
            num_kept = [min(self._lengths[before], lengths[row]) for row, before in moves]
            for row in others:
                self._tables[row], self._lengths[row] = tables[row], 0
            if moves:
                rows, before = map(list, zip(*moves, strict=True))
                lines = slice(_TABLES, _TABLES + max(num_kept))
                self._numbers[lines, rows] = self._numbers[lines, before]
                for row, length in zip(rows, num_kept, strict=True):
                    self._lengths[row] = length
                    changes.append((row, 0, length))
        for row, length in enumerate(lengths):
            first = self._lengths[row]
            if first < length:
                self._numbers[_TABLES + first : _TABLES + length, row] = tables[row][first:length]
                self._lengths[row] = length
                changes.append((row, first, length))
        return changes

    def _copy(self, width: int, changes: Sequence[tuple[int, int, int]]) -> None:
        """Copy a step's inputs to the device, with the changes of the tables."""
        num_changed, num_lines = sum(stop - first for _, first, stop in changes), _TABLES + width
        is_small = num_lines * self._host.stride(0) * self._host.itemsize <= WHOLE_COPY_BYTES
        if not num_changed:
            self._device[:_SLOTS].copy_(self._host[:_SLOTS], non_blocking=True)
        elif is_small or num_changed > self.max_rows:
            self._device[:num_lines].copy_(self._host[:num_lines], non_blocking=True)
        else:
            where, blocks = self._numbers[_SLOTS:_TABLES]
            end = 0
            for row, first, stop in changes:
                begin, end = end, end + stop - first
                where[begin:end] = range(first * self.max_rows + row, stop * self.max_rows + row, self.max_rows)
                blocks[begin:end] = self._numbers[_TABLES + first : _TABLES + stop, row]
            self._device[:_TABLES].copy_(self._host[:_TABLES], non_blocking=True)
            index, values = self._device[_SLOTS:_TABLES, :end]
            self._device[_TABLES:].view(-1)[index] = values


class DecodeGraphs:
    """Replays a model's forward pass over decodes.

    Args:
        forward: Computes the logits [rows, vocabulary] of a batch without waiting for the device.
        buffers: The buffers of the batches.
        max_rows: Rows of the largest batch.
        record: Records a forward pass.
        logits: Those of other graphs of the same model, which are not used at the same time; None for separate ones.

    Attributes:
        sizes: Rows of the recorded batches, ascending.
        logits: [largest size, vocabulary], where all graphs write their results.

    Raises:
        Exception: Of any kind, if a pass cannot be recorded.
    """

    def __init__(
        self,
        forward: Callable[[DecodeBatch], torch.Tensor],
        buffers: DecodeBuffers,
        max_rows: int,
        record: Recorder,
        *,
        logits: torch.Tensor | None = None,
    ) -> None:
        self.sizes = batch_sizes(max_rows)
        self._buffers = buffers
        self._replays: dict[int, Callable[[], None]] = {}
        buffers.fill([], [], [], self.sizes[-1])
        if logits is None:
            # One tensor for all sizes: a step needs one, and separate ones would stay allocated.
            logits = torch.empty_like(forward(buffers.batch(self.sizes[-1])))
        self.logits = logits
        # Largest first: the other graphs reuse its memory.
        for size in reversed(self.sizes):
            self._replays[size] = record(_Pass(forward, buffers.batch(size), self.logits[:size]))

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
        return self.logits[: len(token_ids)]


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
