"""Decode steps that CUDA graphs replay, with and without adapters.

A graph launches what it recorded. So there are two graphs for each batch size: one of a pass without adapters, which
costs what it costs on a server without them, and one of a pass in which every product reads from tables which
adapters its rows have. A step with an adapter is never replayed by the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from server.engine.adapters.backend import AdapterBackend, DecodeAdapters
from server.engine.adapters.weights import AdapterWeights
from server.engine.attention.decode_batch import DecodeBatch, DecodeBuffers, DecodeGraphs, Recorder

Forward = Callable[[DecodeBatch], torch.Tensor]
"""Computes the logits [rows, vocabulary] of a batch without waiting for the device."""


class DecodeReplays:
    """Replays a model's forward pass over decodes.

    Args:
        forward: The pass.
        buffers: The buffers of the batches.
        max_rows: Rows of the largest batch.
        record: Records a pass.

    Attributes:
        sizes: Rows of the recorded batches, ascending.

    Raises:
        Exception: Of any kind, if a pass cannot be recorded.
    """

    def __init__(self, forward: Forward, buffers: DecodeBuffers, max_rows: int, record: Recorder) -> None:
        self._forward, self._buffers, self._max_rows, self._record = forward, buffers, max_rows, record
        self._bare = DecodeGraphs(forward, buffers, max_rows, record)
        self.sizes = self._bare.sizes
        self._adapted: tuple[DecodeGraphs, DecodeAdapters] | None = None

    @property
    def has_adapted(self) -> bool:
        """Whether passes with adapters are recorded."""
        return self._adapted is not None

    def record_adapted(self, backend: AdapterBackend) -> bool:
        """Record passes with adapters, too; returns whether the backend can be recorded.

        Raises:
            Exception: Of any kind, if a pass cannot be recorded.
        """
        decodes = backend.decodes(self._max_rows)
        if decodes is None:
            return False

        def forward(batch: DecodeBatch) -> torch.Tensor:
            with decodes.adapting(batch.input_ids.shape[1]):
                return self._forward(batch)

        decodes.fill([])
        graphs = DecodeGraphs(forward, self._buffers, self._max_rows, self._record, logits=self._bare.logits)
        self._adapted = graphs, decodes
        return True

    def drop_adapted(self) -> None:
        """Release the graphs with adapters."""
        self._adapted = None

    def takes(self, count: int, adapters: Sequence[AdapterWeights | None] | None) -> bool:
        """Whether a step can be replayed.

        Args:
            count: Number of decodes.
            adapters: The adapter of each, or None if none has one.
        """
        if count > self.sizes[-1]:
            return False
        return adapters is None or (self._adapted is not None and self._adapted[1].takes(adapters))

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        size: int | None = None,
        adapters: Sequence[AdapterWeights | None] | None = None,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of decodes that ``takes`` allows, valid until the next call.

        Args:
            token_ids: One for each row.
            positions: One for each row.
            tables: The block table of each row.
            size: Size of the graph; None for the smallest that is large enough.
            adapters: The adapter of each row, or None if none has one.

        Raises:
            RuntimeError: If there are adapters, and no pass with adapters was recorded.
        """
        if adapters is None:
            return self._bare.run(token_ids, positions, tables, size)
        if self._adapted is None:
            raise RuntimeError("no pass with adapters was recorded")
        graphs, decodes = self._adapted
        decodes.fill(adapters)
        return graphs.run(token_ids, positions, tables, size)
