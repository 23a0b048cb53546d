"""Attention on GPUs: Triton kernels that read keys and values in place."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from server.engine.attention.backend import AttentionBackend, AttentionCall, AttentionMetadata, Rows
from server.engine.attention.kv_cache import KVCache
from server.engine.cuda.attention_plan import ITEM_FIELDS, MAX_SHARES, Plan, Tiling, choose_tiling, plan_attention
from server.engine.cuda.triton_launcher import use_prebuilt

MIN_KEYS_OF_SHARE = 256
"""Minimum number of keys per program; with fewer, combining the shares costs more than it saves."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs that keep one multiprocessor of the GPU busy."""


def load_kernels() -> ModuleType:
    """Import the kernels' module; late, because it imports Triton.

    Raises:
        ImportError: If Triton is not installed.
    """
    use_prebuilt()
    return importlib.import_module("server.engine.cuda.triton_kernels")


class TritonBackend(AttentionBackend):
    """Paged attention for decodes and prefill chunks, without gathering keys.

    Launches over decodes depend on the tensors' shapes only, so a CUDA graph may record them.

    Args:
        cache: On a CUDA device; on any device in Triton's interpreter.
        num_processors: Multiprocessors of the GPU.

    Raises:
        ImportError: If Triton is not installed.
    """

    def __init__(self, cache: KVCache, num_processors: int = 4) -> None:
        self._kernels = load_kernels()
        super().__init__(cache)
        self._dims = max(16, _power_of_two(cache.spec.head_dim))
        self._num_programs = num_processors * PROGRAMS_PER_PROCESSOR
        self._min_keys_of_share = MIN_KEYS_OF_SHARE
        # What a launch does not read has the type of what others read, so that no kernel is compiled twice.
        self._no_parts = torch.empty(16, device=cache.tensor.device)
        self._no_items = torch.zeros(ITEM_FIELDS, dtype=torch.int32, device=cache.tensor.device)
        self._planned: AttentionMetadata | None = None
        self._plans: dict[tuple[int, int | None], Plan] = {}

    @property
    def is_capturable(self) -> bool:
        """True; see the base class."""
        return True

    def store(self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: AttentionMetadata) -> None:
        """One launch for all rows; see the base class."""
        spec = self.cache.spec
        keys, values = self.cache.layer(layer)
        key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (key, value))
        self._kernels.store[(key.shape[1],)](
            key,
            value,
            keys,
            values,
            metadata.slot_mapping,
            *key.stride()[:2],
            *value.stride()[:2],
            NUM_HEADS=spec.num_kv_heads,
            HEAD_DIM=spec.head_dim,
            HEADS=_power_of_two(spec.num_kv_heads),
            DIMS=self._dims,
            num_warps=4,
        )

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """One launch for all rows, and one more if keys are divided among programs; see the base class.

        Raises:
            ValueError: If there are prefill chunks, and the metadata is not from ``make_metadata``.
        """
        query = query if query.stride(-1) == 1 else query.contiguous()
        first = metadata.groups[0]
        if len(metadata.groups) == 1 and first.query_positions.shape[1] == 1:
            return self._attend_decodes(query, layer, first, call)
        return self._attend_listed(query, layer, metadata, call)

    def end(self) -> None:
        """Release the plan of the step; see the base class."""
        super().end()
        self._planned = None
        self._plans.clear()

    def num_shares(self, num_tiles: int, num_keys: int) -> int:
        """Number of programs that divide the keys of a decode.

        Args:
            num_tiles: Decodes times key/value heads.
            num_keys: Maximum number of keys of a decode, from the shape of the block tables.
        """
        return max(1, min(self._num_programs // num_tiles, num_keys // self._min_keys_of_share, MAX_SHARES))

    def _attend_decodes(self, query: torch.Tensor, layer: int, rows: Rows, call: AttentionCall) -> torch.Tensor:
        """Attention of one row of each sequence; the launches depend on shapes only."""
        spec = self.cache.spec
        num_rows = query.shape[1]
        num_shares = self.num_shares(num_rows * spec.num_kv_heads, rows.tables.shape[1] * spec.block_size)
        work = _Work(
            (num_rows * spec.num_kv_heads, num_shares),
            choose_tiling(self._dims, spec.dtype.itemsize, self._group_size(query), is_decode=True),
            rows.tables,
            (*rows.tables.stride(), rows.query_positions.stride(0)),
            rows.query_positions,
            num_parts=num_rows * num_shares if num_shares > 1 else 0,
            num_merges=num_rows if num_shares > 1 else 0,
            num_shares=num_shares,
        )
        return self._launch(query, layer, call, work)

    def _attend_listed(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """Attention of rows of any number of each sequence."""
        spec, group_size = self.cache.spec, self._group_size(query)
        if metadata.tables is None:
            raise ValueError("prefill chunks need the metadata of make_metadata")
        if metadata is not self._planned:
            self._planned = metadata
            self._plans.clear()
        tiling = choose_tiling(self._dims, spec.dtype.itemsize, group_size, is_decode=False)
        plan = self._plans.get((group_size, call.window))
        if plan is None:
            plan = self._plans[group_size, call.window] = plan_attention(
                metadata.spans,
                tiling,
                group_size=group_size,
                num_kv_heads=spec.num_kv_heads,
                window=call.window,
                num_programs=self._num_programs,
                min_keys_of_share=self._min_keys_of_share,
                device=query.device,
            )
        work = _Work(
            (len(plan.items) * spec.num_kv_heads, 1),
            tiling,
            metadata.tables,
            (0, 1, 0),
            metadata.slot_mapping,
            num_parts=plan.num_parts,
            num_merges=len(plan.merges),
            plan=plan,
        )
        return self._launch(query, layer, call, work)

    def _launch(self, query: torch.Tensor, layer: int, call: AttentionCall, work: _Work) -> torch.Tensor:
        spec, plan, tiling = self.cache.spec, work.plan, work.tiling
        keys, values = self.cache.layer(layer)
        num_heads, num_rows, head_dim = query.shape
        out = query.new_empty(num_rows, num_heads, head_dim)
        parts = maxima = sums = self._no_parts
        if work.num_parts:
            lanes = work.num_parts * spec.num_kv_heads * tiling.lanes
            scratch = torch.empty(lanes * (head_dim + 2), device=query.device)
            parts, maxima, sums = torch.split(scratch, [lanes * head_dim, lanes, lanes])
        shape = {
            "NUM_KV_HEADS": spec.num_kv_heads,
            "GROUP_SIZE": num_heads // spec.num_kv_heads,
            "HEAD_DIM": head_dim,
            "DIMS": self._dims,
            "LANES": tiling.lanes,
            "IS_LISTED": plan is not None,
        }
        self._kernels.attend[work.grid](
            query,
            keys,
            values,
            work.tables,
            work.positions,
            self._no_items if plan is None else plan.items,
            out if call.sinks is None else call.sinks,
            out,
            parts,
            maxima,
            sums,
            call.scale,
            call.softcap or 1.0,
            call.window or 0,
            *query.stride()[:2],
            *work.strides,
            BLOCK_SIZE=spec.block_size,
            TILE_KEYS=tiling.keys,
            HAS_SOFTCAP=call.softcap is not None,
            HAS_SINKS=call.sinks is not None,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            **shape,
        )
        if work.num_merges:
            self._kernels.combine[(work.num_merges * num_heads,)](
                parts,
                maxima,
                sums,
                self._no_items if plan is None else plan.merges,
                out,
                work.num_shares,
                MAX_SHARES=MAX_SHARES,
                num_warps=4,
                **shape,
            )
        return out

    def _group_size(self, query: torch.Tensor) -> int:
        return query.shape[0] // self.cache.spec.num_kv_heads


@dataclass(frozen=True, slots=True)
class _Work:
    """What differs between the launches over decodes and over a plan; ``triton_kernels.attend`` says the rest.

    Attributes:
        strides: Of the sequences and blocks of ``tables``, and of ``positions``.
        num_merges: Rows whose keys are divided.
        num_shares: Programs that divide the keys of each decode.
        plan: None for decodes.
    """

    grid: tuple[int, int]
    tiling: Tiling
    tables: torch.Tensor
    strides: tuple[int, ...]
    positions: torch.Tensor
    num_parts: int
    num_merges: int
    num_shares: int = 0
    plan: Plan | None = None


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least a number."""
    return 1 << (number - 1).bit_length()
