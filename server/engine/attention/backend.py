"""Attention over paged keys and values, as the transformers models call it.

transformers lets a model's attention be replaced by name (``AttentionInterface``) and hands the function queries,
new keys and new values with positions already applied. Ours writes the new keys and values into the blocks, then
reads every sequence's own. So a model needs no code of ours, and no sequence is ever padded.

The flat batch holds rows of many sequences side by side: [1, heads, rows, head_dim]. Which rows belong to whom,
and where their keys lie, is an ``AttentionMetadata`` that the model runner makes once a step for all layers.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from server.engine.attention.kv_cache import KVCache
from server.engine.attention.transfers import queue_copies

_backend_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Rows:
    """A group of rows that one attention call computes.

    Attributes:
        start: First row of the flat batch.
        stop: Row after the last.
        tables: [sequences, blocks] int64, where the keys lie; what is past a sequence's end is anybody's.
        query_positions: [sequences, rows of each] int64.
    """

    start: int
    stop: int
    tables: torch.Tensor
    query_positions: torch.Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Which rows attend to which keys, for one step.

    Attributes:
        slot_mapping: [rows] int64, where each row's own key and value are written.
        groups: All decodes together (one row each), then each prefill chunk by itself.
        block_size: Positions in a block.
        masks: Additive masks by (group, window), made when a layer first asks.
        foreign: By group, which of the last keys gathered for a sequence are past its end, made likewise.
    """

    slot_mapping: torch.Tensor
    groups: list[Rows]
    block_size: int
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    foreign: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks of attention besides its queries, keys and values; the same at every step.

    Attributes:
        scale: Factor of the scores.
        window: Newest keys that a row sees, itself included; None for all.
        softcap: Bound of the scaled scores, which pass through ``softcap * tanh(score / softcap)`` (Gemma 2); None
            for no bound.
        sinks: [heads], for each a score that every row's softmax also sums over, with no value to it (GPT-OSS); None
            for none.
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
        """From what transformers' models hand to the attention interface.

        Raises:
            NotImplementedError: If that changes the scores in a way that is not known here.
        """
        if others.get("position_bias") is not None:
            raise NotImplementedError("attention with position_bias is not supported")
        return cls(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)


class AttentionBackend(ABC):
    """Paged attention for one model on one device.

    Registers itself with transformers under ``name`` (a model is switched to it by ``set_attn_implementation``)
    until ``close``.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        # Without the class's name: with "sdpa" in it, transformers would refuse it for Gemma 2.
        self.name = f"prelude_{next(_backend_numbers)}"
        self.layers: set[int] = set()
        """Layers that have called it."""
        self.calls: dict[int, AttentionCall] = {}
        """What each layer asked for when it last called through transformers."""
        self._metadata: AttentionMetadata | None = None
        AttentionInterface.register(self.name, self._forward)
        # Not with the masks: causality and windows are decided here by position, and for a name that it does not know
        # there transformers makes none. For one that it knows it looks into the positions, and waits for the device.

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph of a step may be replayed over other keys, up to what block tables have room for."""
        return False

    def close(self) -> None:
        """Take the name out of transformers' tables."""
        unregister(self.name)

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set what the next forward pass attends to."""
        self._metadata = metadata

    def end(self) -> None:
        """Forget it, so that a stray forward pass fails instead of reading old blocks."""
        self._metadata = None

    def metadata(self, layer: int) -> AttentionMetadata:
        """What a layer attends to in this step.

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
        attention_mask: torch.Tensor | None,
        **given: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        if not isinstance(layer, int):
            raise TypeError(f"{type(module).__name__} does not know its layer")
        call = self.calls[layer] = AttentionCall.of(query, **given)
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

        What is not finite stays so, and makes every row that sees it fail: a number in its place would be taken for
        a key. Rows that may not see it never compute with it, whoever owns the block by then.

        Args:
            key: [kv_heads, rows, head_dim].
            value: Likewise.
            layer: Whose they are.
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
            layer: Whose keys and values, new ones included, to read from the cache.
            metadata: Whose rows and keys are whose.
            call: The layer's own.

        Returns:
            [rows, heads, head_dim].
        """


class SDPABackend(AttentionBackend):
    """The reference for every device: gathers each group's keys and calls torch's SDPA.

    Heads that share a key/value head are laid side by side as rows, so keys are never repeated.
    """

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """One SDPA call for all decodes, and one for each prefill chunk; shapes as in the base class."""
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
        """Attention of the rows of ``metadata.groups[index]``; the rest as in ``attend``."""
        keys, values = self.cache.layer(layer)
        rows = metadata.groups[index]
        num_heads, _, head_dim = query.shape
        num_kv_heads = keys.shape[1]
        num_seqs, per_seq = rows.query_positions.shape
        # [heads, rows] -> [seqs, kv_heads, heads of each * rows of each]
        q = query.reshape(num_kv_heads, -1, num_seqs, per_seq, head_dim)
        q = q.permute(2, 0, 1, 3, 4).reshape(num_seqs, num_kv_heads, -1, head_dim)
        foreign = self._foreign(metadata, index)
        k = _gather(keys, rows.tables, metadata.block_size, foreign).transpose(1, 2)
        v = _gather(values, rows.tables, metadata.block_size, foreign).transpose(1, 2)
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

    def _foreign(self, metadata: AttentionMetadata, index: int) -> torch.Tensor:
        """[seqs, last keys, 1, 1]: whether a key is past a sequence's end, of as many as can be.

        A chunk by itself fills its table but for its last block; sequences of several lengths do not.
        """
        foreign = metadata.foreign.get(index)
        if foreign is None:
            rows = metadata.groups[index]
            num_keys = rows.tables.shape[1] * metadata.block_size
            first = num_keys - metadata.block_size if rows.query_positions.shape[1] > 1 else 0
            key_positions = torch.arange(first, num_keys, device=rows.tables.device)
            foreign = (key_positions > rows.query_positions[:, -1:])[:, :, None, None]
            metadata.foreign[index] = foreign
        return foreign

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
    """Lay out one step's rows.

    Args:
        spans: (block table, first position, number of positions) of each chunk, single positions first.
        block_size: Positions in a block.
        device: Where the tensors are wanted.
    """
    num_decodes = 0
    while num_decodes < len(spans) and spans[num_decodes][2] == 1:
        num_decodes += 1
    slot_mapping: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    for batch in (spans[:num_decodes], *([span] for span in spans[num_decodes:])):
        if not batch:
            continue
        per_seq = batch[0][2]
        starts = torch.tensor([start for _, start, _ in batch])
        query_positions = starts[:, None] + torch.arange(per_seq)
        num_keys = int(starts.max()) + per_seq
        num_blocks = -(-num_keys // block_size)
        # Short tables are filled up with block 0, whose content counts for nothing.
        tables = torch.tensor([_fit(table, num_blocks) for table, _, _ in batch])
        blocks = tables.gather(1, query_positions // block_size)
        slot_mapping.append((blocks * block_size + query_positions % block_size).flatten())
        parts += [tables, query_positions]
    slots, *parts = queue_copies([torch.cat(slot_mapping), *parts], device)
    groups: list[Rows] = []
    first_row = 0
    for tables, query_positions in zip(parts[::2], parts[1::2], strict=True):
        last_row = first_row + query_positions.numel()
        groups.append(Rows(first_row, last_row, tables, query_positions))
        first_row = last_row
    return AttentionMetadata(slots, groups, block_size)


def _gather(slots: torch.Tensor, tables: torch.Tensor, block_size: int, foreign: torch.Tensor) -> torch.Tensor:
    """Keys or values, [slots, kv_heads, head_dim], of each sequence: [sequences, keys, kv_heads, head_dim].

    Whole blocks are copied, each in one piece: by slot it would be a piece for each position. Foreign ones become
    zeros: a mask that is added and a weight of 0 do not hide NaN, nor scores that overflow.
    """
    blocks = slots.view(-1, block_size, *slots.shape[1:]).index_select(0, tables.flatten())
    gathered = blocks.view(tables.shape[0], -1, *slots.shape[1:])
    gathered[:, gathered.shape[1] - foreign.shape[1] :].masked_fill_(foreign, 0.0)
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
    """What SDPA has no argument for; shapes as SDPA's, the softmax in float32 as in transformers' Gemma 2.

    ``sinks`` [kv_heads, rows of each kv head] take their share of the softmax, and nothing is read for it.
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


def unregister(name: str) -> None:
    """Take a name out of transformers' tables of attention and masks."""
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop(name, None)  # noqa: SLF001 - there is no public way to unregister


def no_mask(*args: object, **kwargs: object) -> None:
    """For the mask interface, where attention itself knows what each row sees."""
