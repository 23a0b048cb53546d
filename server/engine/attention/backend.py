"""Attention over paged keys and values, called by transformers' models.

transformers replaces a model's attention by name (``AttentionInterface``) and passes queries, new keys and new values
with positions applied. A backend writes the new keys and values into blocks, then attends to each sequence's own. So
a model needs no code of ours, and sequences are never padded.

The flat batch holds the rows of many sequences: [1, heads, rows, head_dim]. ``AttentionMetadata`` says which rows
belong to which sequence and where its keys are; it is made once per step for all layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from server.engine.attention.kv_cache import KVCache
from server.engine.attention.transfers import queue_copies

ATTENTION = "prelude"
"""The attention implementation of every served model, by its name in transformers.

The name has no mask function: backends decide by position what a row sees, and transformers makes no mask for a name
without one. Otherwise it would inspect the positions, and wait for the device.
"""

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
"""Module, queries, keys, values and mask, and the model's options by name, to [1, rows, heads, head_dim] and None."""

_current: ContextVar[AttentionFunction | None] = ContextVar("attention", default=None)


def set_attention(function: AttentionFunction | None) -> None:
    """Set the function that computes ``ATTENTION`` in this thread; with None a forward pass fails."""
    _current.set(function)


def _attention(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    function = _current.get()
    if function is None:
        raise RuntimeError("a forward pass outside of a step")
    return function(*arguments, **options)


AttentionInterface.register(ATTENTION, _attention)


@dataclass(frozen=True, slots=True)
class Rows:
    """A group of rows that one attention call computes.

    Attributes:
        start: First row of the flat batch.
        stop: Row after the last.
        tables: [sequences, blocks] int64, the block tables; entries past a sequence's end are arbitrary.
        query_positions: [sequences, rows of each] int64.
    """

    start: int
    stop: int
    tables: torch.Tensor
    query_positions: torch.Tensor


class RowSpan(NamedTuple):
    """The rows of one sequence in the flat batch, known on the host.

    Attributes:
        first_row: Its first row.
        num_rows: Its number of rows.
        first_position: The position of its first row.
        first_block: Where its block table starts in ``AttentionMetadata.tables``.
    """

    first_row: int
    num_rows: int
    first_position: int
    first_block: int


@dataclass(slots=True)
class AttentionMetadata:
    """Which rows attend to which keys, for one step.

    Attributes:
        slot_mapping: [rows] int64, the slot of each row's key and value.
        groups: One group of all decodes (one row each), then one for each prefill chunk.
        block_size: Positions in a block.
        spans: The rows of each sequence; empty if the groups hold all that is known on the host.
        tables: [blocks of all sequences] int64, the block tables of ``spans``; those of the groups are views of it.
        masks: Additive masks by (group, window), computed when first needed.
        past_end: By group, which of the last gathered keys are past their sequence's end, computed when first needed.
    """

    slot_mapping: torch.Tensor
    groups: list[Rows]
    block_size: int
    spans: Sequence[RowSpan] = ()
    tables: torch.Tensor | None = None
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    past_end: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A layer's attention parameters; the same in every step.

    Attributes:
        scale: Factor of the scores.
        window: Number of newest keys that a row sees, its own included; None for all.
        softcap: Bound of the scaled scores, applied as ``softcap * tanh(score / softcap)`` (Gemma 2); None for none.
        sinks: [heads], a score per head that is added to the softmax without a value (GPT-OSS); None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **others: object,
    ) -> AttentionCall:
        """The parameters in a call of transformers' attention interface.

        Raises:
            NotImplementedError: If the call has a position bias.
        """
        if others.get("position_bias") is not None:
            raise NotImplementedError("attention with position_bias is not supported")
        return cls(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)


class AttentionBackend(ABC):
    """Paged attention for one model on one device.

    Computes ``ATTENTION`` between ``begin`` and ``end``.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.layers: set[int] = set()
        """Layers that have called it."""
        self.calls: dict[int, AttentionCall] = {}
        """Each layer's parameters in its last call through transformers."""
        self._metadata: AttentionMetadata | None = None

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph of a step may be replayed over other keys, up to the width of the block tables."""
        return False

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set the metadata of the next forward pass."""
        self._metadata = metadata
        set_attention(self._forward)

    def end(self) -> None:
        """Clear the metadata, so that a forward pass outside of a step fails instead of reading stale blocks."""
        self._metadata = None
        set_attention(None)

    def metadata(self, layer: int) -> AttentionMetadata:
        """The metadata of this step, for a layer that calls the backend.

        Raises:
            RuntimeError: Outside of a step.
        """
        if self._metadata is None:
            raise RuntimeError("a forward pass outside of a step")
        self.layers.add(layer)
        return self._metadata

    def _forward(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        if not isinstance(layer, int):
            raise TypeError(f"{type(module).__name__} does not know its layer")
        call = self.calls[layer] = AttentionCall.of(query, **options)
        metadata = self.metadata(layer)
        keys, _ = self.cache.layer(layer)
        if key.shape[1] != keys.shape[1] or key.shape[-1] != keys.shape[-1] or value.shape != key.shape:
            got = [tuple(tensor.shape[1::2]) for tensor in (key, value)]
            raise NotImplementedError(
                f"layer {layer} has keys and values of {got} (heads, width); {tuple(keys.shape[1:])} was expected"
            )
        self.store(key[0], value[0], layer, metadata)
        return self.attend(query[0], layer, metadata, call)[None], None

    def store(self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: AttentionMetadata) -> None:
        """Write new keys and values into their slots, finite or not.

        A value that is not finite makes every row that sees it fail; replacing it would give wrong tokens instead.
        Rows that do not see it never compute with it, even if another sequence owns the block by then.

        Args:
            key: [kv_heads, rows, head_dim].
            value: [kv_heads, rows, head_dim].
            layer: The layer.
            metadata: The rows' slots.
        """
        keys, values = self.cache.layer(layer)
        keys[metadata.slot_mapping] = key.transpose(0, 1)
        values[metadata.slot_mapping] = value.transpose(0, 1)

    @abstractmethod
    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """Attention of all rows of the flat batch.

        Args:
            query: [heads, rows, head_dim].
            layer: The layer; its new keys and values are in the cache already.
            metadata: The rows and their block tables.
            call: The layer's parameters.

        Returns:
            [rows, heads, head_dim].
        """


class SDPABackend(AttentionBackend):
    """The reference backend for every device: gathers each group's keys and calls torch's SDPA.

    Query heads of one key/value head become rows, so keys are not repeated.
    """

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """One SDPA call for all decodes, and one for each prefill chunk; see the base class."""
        if len(metadata.groups) == 1:
            return self.attend_group(query, layer, metadata, 0, call)
        num_heads, num_rows, head_dim = query.shape
        output = query.new_empty(num_rows, num_heads, head_dim)
        for index, rows in enumerate(metadata.groups):
            part = query[:, rows.start : rows.stop]
            output[rows.start : rows.stop] = self.attend_group(part, layer, metadata, index, call)
        return output

    def attend_group(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, index: int, call: AttentionCall
    ) -> torch.Tensor:
        """``attend`` for the rows of ``metadata.groups[index]``."""
        keys, values = self.cache.layer(layer)
        rows = metadata.groups[index]
        num_heads, _, head_dim = query.shape
        num_kv_heads = keys.shape[1]
        num_seqs, per_seq = rows.query_positions.shape
        # [heads, rows] -> [seqs, kv_heads, heads of each * rows of each]
        q = query.reshape(num_kv_heads, -1, num_seqs, per_seq, head_dim)
        q = q.permute(2, 0, 1, 3, 4).reshape(num_seqs, num_kv_heads, -1, head_dim)
        past_end = self._past_end(metadata, index)
        k = _gather(keys, rows.tables, metadata.block_size, past_end).transpose(1, 2)
        v = _gather(values, rows.tables, metadata.block_size, past_end).transpose(1, 2)
        mask = self._mask(metadata, index, call.window, num_heads // num_kv_heads, q.dtype)
        if call.softcap is None and call.sinks is None:
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
        else:
            sinks = call.sinks
            if sinks is not None:
                sinks = sinks.view(num_kv_heads, -1).repeat_interleave(per_seq, dim=1)
            attended = _manual_attention(q, k, v, mask, call.scale, call.softcap, sinks)
        attended = attended.reshape(num_seqs, num_heads, per_seq, head_dim).transpose(1, 2)
        return attended.reshape(-1, num_heads, head_dim)

    def _past_end(self, metadata: AttentionMetadata, index: int) -> torch.Tensor:
        """[seqs, last keys, 1, 1]: whether a key is past its sequence's end, for the keys that can be.

        These are the last block of a prefill chunk, and all keys of decodes, which have different lengths.
        """
        past_end = metadata.past_end.get(index)
        if past_end is None:
            rows = metadata.groups[index]
            num_keys = rows.tables.shape[1] * metadata.block_size
            first = num_keys - metadata.block_size if rows.query_positions.shape[1] > 1 else 0
            key_positions = torch.arange(first, num_keys, device=rows.tables.device)
            past_end = (key_positions > rows.query_positions[:, -1:])[:, :, None, None]
            metadata.past_end[index] = past_end
        return past_end

    def _mask(
        self, metadata: AttentionMetadata, index: int, window: int | None, group_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """[seqs, 1, heads of each kv head * rows of each, keys]: 0 where a row sees a key, else -inf."""
        mask = metadata.masks.get((index, window))
        if mask is None:
            rows = metadata.groups[index]
            num_keys = rows.tables.shape[1] * metadata.block_size
            key_positions = torch.arange(num_keys, device=rows.tables.device)
            query_positions = rows.query_positions[:, :, None]
            hidden = key_positions > query_positions
            if window is not None:
                hidden |= key_positions <= query_positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            mask = mask[:, None].repeat(1, 1, group_size, 1)
            metadata.masks[index, window] = mask
        return mask


def make_metadata(
    spans: Sequence[tuple[Sequence[int], int, int]], block_size: int, device: torch.device
) -> AttentionMetadata:
    """The metadata of one step.

    Args:
        spans: (block table, first position, number of positions) of each chunk, decodes (one position) first.
        block_size: Positions in a block.
        device: The device of the tensors.
    """
    num_decodes = 0
    while num_decodes < len(spans) and spans[num_decodes][2] == 1:
        num_decodes += 1
    slot_mapping: list[torch.Tensor] = []
    all_tables: list[torch.Tensor] = []
    all_positions: list[torch.Tensor] = []
    row_spans: list[RowSpan] = []
    first_row = first_block = 0
    for batch in (spans[:num_decodes], *([span] for span in spans[num_decodes:])):
        if not batch:
            continue
        per_seq = batch[0][2]
        starts = torch.tensor([start for _, start, _ in batch])
        query_positions = starts[:, None] + torch.arange(per_seq)
        num_keys = int(starts.max()) + per_seq
        num_blocks = -(-num_keys // block_size)
        # Short tables are padded with block 0, whose content is masked.
        tables = torch.tensor([_fit(table, num_blocks) for table, _, _ in batch])
        blocks = tables.gather(1, query_positions // block_size)
        slot_mapping.append((blocks * block_size + query_positions % block_size).flatten())
        all_tables.append(tables)
        all_positions.append(query_positions)
        for _, start, _ in batch:
            row_spans.append(RowSpan(first_row, per_seq, start, first_block))
            first_row, first_block = first_row + per_seq, first_block + num_blocks
    host_tables = torch.cat([tables.flatten() for tables in all_tables])
    slots, flat_tables, *positions = queue_copies([torch.cat(slot_mapping), host_tables, *all_positions], device)
    tables_of_groups = torch.split(flat_tables, [tables.numel() for tables in all_tables])
    groups: list[Rows] = []
    first_row = 0
    for own, shaped, query_positions in zip(tables_of_groups, all_tables, positions, strict=True):
        last_row = first_row + query_positions.numel()
        groups.append(Rows(first_row, last_row, own.view(shaped.shape), query_positions))
        first_row = last_row
    return AttentionMetadata(slots, groups, block_size, row_spans, flat_tables)


def _gather(slots: torch.Tensor, tables: torch.Tensor, block_size: int, past_end: torch.Tensor) -> torch.Tensor:
    """Each sequence's keys or values: [slots, kv_heads, head_dim] to [sequences, keys, kv_heads, head_dim].

    Copies whole blocks, which is faster than copying slots. Keys past a sequence's end become zero, because an
    additive mask and a weight of 0 hide neither NaN nor scores that overflow.
    """
    blocks = slots.view(-1, block_size, *slots.shape[1:]).index_select(0, tables.flatten())
    gathered = blocks.view(tables.shape[0], -1, *slots.shape[1:])
    gathered[:, gathered.shape[1] - past_end.shape[1] :].masked_fill_(past_end, 0.0)
    return gathered


def _manual_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a cap or sinks, which SDPA lacks; SDPA's shapes, and a float32 softmax as in Gemma 2.

    ``sinks`` [kv_heads, rows of each kv head] are added to the denominator of the softmax.
    """
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(mask != 0, float("-inf"))
    if sinks is None:
        return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    shares = sinks.to(scores)[None, :, :, None].expand(*scores.shape[:-1], 1)
    weights = nn.functional.softmax(torch.cat([scores, shares], dim=-1), dim=-1, dtype=torch.float32)
    return weights[..., :-1].to(value.dtype) @ value


def _fit(table: Sequence[int], length: int) -> list[int]:
    fitted = list(table[:length])
    return fitted + [0] * (length - len(fitted))
