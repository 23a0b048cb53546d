"""Forward passes of a model over paged keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from server.engine.attention.backend import AttentionBackend, AttentionMetadata, make_metadata
from server.engine.attention.decode_batch import DecodeBatch, DecodeBuffers
from server.engine.attention.transfers import to_device
from server.engine.model.exactness import Span


class PagedModel:
    """A model with an attention backend.

    Args:
        model: A model with the attention ``ATTENTION``.
        backend: The backend, with the cache.
        buffers: The inputs of decodes.
    """

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend, buffers: DecodeBuffers) -> None:
        self.backend = backend
        self._model = model
        self._buffers = buffers
        self._block_size = backend.cache.spec.block_size
        self._device = backend.cache.tensor.device

    def forward(
        self, spans: Sequence[Span], inputs: dict[str, torch.Tensor], logit_rows: Sequence[int]
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of some rows of one flat batch.

        Args:
            spans: As for ``make_metadata``.
            inputs: Token ids [1, rows] or embeddings [1, rows, width], by the name of the model's parameter.
            logit_rows: Rows whose logits are computed, at least one.
        """
        metadata, position_ids = self._prepare(spans)
        return self._pass(metadata, position_ids, **inputs, logits_to_keep=to_device(logit_rows, self._device))

    def forward_base(self, spans: Sequence[Span], inputs: dict[str, torch.Tensor]) -> ModelOutput:
        """The output of the base model, without the vocabulary head. Arguments are those of ``forward``."""
        metadata, position_ids = self._prepare(spans)
        with self._attending(metadata):
            output: ModelOutput = self._model.base_model(**inputs, position_ids=position_ids, use_cache=False)
        return output

    def forward_decodes(self, batch: DecodeBatch) -> torch.Tensor:
        """Logits [rows, vocabulary] of all rows of a batch of decodes."""
        return self._pass(batch.metadata, batch.position_ids, input_ids=batch.input_ids)

    def launch_decodes(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]], size: int
    ) -> torch.Tensor:
        """Logits [tokens, vocabulary] of decodes, without a CUDA graph.

        Args:
            token_ids: The token of each row.
            positions: The position of each row.
            tables: The block table of each row.
            size: Rows of the padded batch, at least the number of tokens.
        """
        width = self._buffers.fill(token_ids, positions, tables, size)
        return self.forward_decodes(self._buffers.batch(size, width))[: len(token_ids)]

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
