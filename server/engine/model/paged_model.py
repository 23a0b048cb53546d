"""Forward passes of a model over paged keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from server.engine.adapters.backend import AdaptedRows, AdapterBackend
from server.engine.adapters.weights import AdapterWeights
from server.engine.attention.backend import AttentionBackend, AttentionMetadata, make_metadata
from server.engine.attention.decode_batch import DecodeBatch, DecodeBuffers
from server.engine.attention.transfers import to_device
from server.engine.model.exactness import Span

Adapters = Sequence[AdapterWeights | None]
"""The adapter of each of several things, in order; None for those without one."""


class PagedModel:
    """A model with an attention backend.

    Methods that take ``adapters`` run as if there were no adapters if it is None or holds only None.

    Args:
        model: A model with the attention ``ATTENTION``.
        backend: The backend, with the cache.
        buffers: The inputs of decodes.

    Attributes:
        adapter_backend: Computes the products of passes with adapters; None if there can be none.
    """

    adapter_backend: AdapterBackend | None = None

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend, buffers: DecodeBuffers) -> None:
        self.backend = backend
        self._model = model
        self._buffers = buffers
        self._block_size = backend.cache.spec.block_size
        self._device = backend.cache.tensor.device

    def forward(
        self,
        spans: Sequence[Span],
        inputs: dict[str, torch.Tensor],
        logit_rows: Sequence[int],
        adapters: Adapters | None = None,
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of some rows of one flat batch.

        Args:
            spans: As for ``make_metadata``.
            inputs: Token ids [1, rows] or embeddings [1, rows, width], by the name of the model's parameter.
            logit_rows: Rows whose logits are computed, at least one.
            adapters: The adapter of each span.
        """
        metadata, position_ids = self._prepare(spans)
        kept = to_device(logit_rows, self._device)
        if adapters is None or not any(adapters):
            return self._pass(metadata, position_ids, **inputs, logits_to_keep=kept)
        of_rows = [one for one, (_, _, count) in zip(adapters, spans, strict=True) for _ in range(count)]
        of_kept = [of_rows[row] for row in logit_rows]
        with self._adapting(adapters, [count for _, _, count in spans], of_kept):
            return self._pass(metadata, position_ids, **inputs, logits_to_keep=kept)

    def forward_base(
        self, spans: Sequence[Span], inputs: dict[str, torch.Tensor], adapters: Adapters | None = None
    ) -> ModelOutput:
        """The output of the base model, without the vocabulary head. Arguments are those of ``forward``."""
        metadata, position_ids = self._prepare(spans)
        if adapters is None or not any(adapters):
            return self._base_pass(metadata, position_ids, **inputs)
        with self._adapting(adapters, [count for _, _, count in spans], []):
            return self._base_pass(metadata, position_ids, **inputs)

    def _base_pass(
        self, metadata: AttentionMetadata, position_ids: torch.Tensor, **inputs: torch.Tensor
    ) -> ModelOutput:
        with self._attending(metadata):
            output: ModelOutput = self._model.base_model(**inputs, position_ids=position_ids, use_cache=False)
        return output

    def forward_decodes(self, batch: DecodeBatch) -> torch.Tensor:
        """Logits [rows, vocabulary] of all rows of a batch of decodes."""
        return self._pass(batch.metadata, batch.position_ids, input_ids=batch.input_ids)

    def launch_decodes(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        size: int,
        adapters: Adapters | None = None,
    ) -> torch.Tensor:
        """Logits [tokens, vocabulary] of decodes, without a CUDA graph.

        Args:
            token_ids: The token of each row.
            positions: The position of each row.
            tables: The block table of each row.
            size: Rows of the padded batch, at least the number of tokens.
            adapters: The adapter of each row.
        """
        width = self._buffers.fill(token_ids, positions, tables, size)
        batch = self._buffers.batch(size, width)
        if adapters is None or not any(adapters):
            return self.forward_decodes(batch)[: len(token_ids)]
        padded = [*adapters, *[None] * (size - len(adapters))]
        with self._adapting(padded, [1] * size, padded):
            return self.forward_decodes(batch)[: len(token_ids)]

    def can_decode(self, size: int) -> bool:
        """Whether ``launch_decodes`` takes a batch of that size."""
        return size <= self._buffers.max_rows

    def embed(self, token_ids: torch.Tensor, counts: Sequence[int], adapters: Adapters | None = None) -> torch.Tensor:
        """The input embeddings of a flat batch: [1, rows, width].

        Args:
            token_ids: [1, rows].
            counts: The number of rows of each span.
            adapters: The adapter of each span.
        """
        context = self._adapting(adapters, counts, []) if adapters is not None and any(adapters) else nullcontext()
        with context:
            embeddings: torch.Tensor = self._model.get_input_embeddings()(token_ids)
        return embeddings

    def adapting_head(self, adapters: Adapters) -> AbstractContextManager[None]:
        """Let the vocabulary head of a pass without layers have adapters.

        Args:
            adapters: The adapter of each row of hidden states.
        """
        return self._adapting([], [], adapters) if any(adapters) else nullcontext()

    def _adapting(self, adapters: Adapters, counts: Sequence[int], kept: Adapters) -> AbstractContextManager[None]:
        """A pass with adapters.

        Args:
            adapters: The adapter of each span.
            counts: The number of rows of each span.
            kept: The adapter of each row whose logits are computed.

        Raises:
            RuntimeError: If the model cannot have adapters.
        """
        if self.adapter_backend is None:
            raise RuntimeError("the model cannot have adapters")
        return self.adapter_backend.adapting(AdaptedRows(adapters, counts), AdaptedRows(kept, [1] * len(kept)))

    def _prepare(self, spans: Sequence[Span]) -> tuple[AttentionMetadata, torch.Tensor]:
        """The metadata of a flat batch, and its positions [1, rows]."""
        metadata = make_metadata(spans, self._block_size, self._device)
        return metadata, torch.cat([rows.query_positions.flatten() for rows in metadata.groups])[None]

    def _pass(self, metadata: AttentionMetadata, position_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        with self._attending(metadata):
            logits: torch.Tensor = self._model(**inputs, position_ids=position_ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def _attending(self, metadata: AttentionMetadata) -> Iterator[None]:
        self.backend.begin(metadata)
        try:
            yield
        finally:
            self.backend.end()
