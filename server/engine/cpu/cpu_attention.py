"""Attention on CPUs by compiled kernels: one for single rows, one for the rows of prefill chunks in tiles."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch

from server.engine.attention.backend import AttentionBackend, AttentionCall, AttentionMetadata, Rows, SDPABackend
from server.engine.attention.kv_cache import KVCache
from server.engine.cpu.compiled import KINDS, Elements, elements, set_num_threads
from server.engine.cpu.decode_kernel import (
    attend_rows,
    attend_rows_in_parallel,
    rotate_and_attend,
    rotate_and_attend_in_parallel,
)
from server.engine.cpu.prefill_kernel import attend_tiles, attend_tiles_in_parallel
from server.engine.cpu.row_kernels import NO_WEIGHT, Weights
from server.engine.cpu.tile_code import TILE_KEYS
from server.engine.cpu.vector_code import LANES

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]
Item = TypeVar("Item")
Positions = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [1, rows, head_dim] each, as the model computes them once per pass."""

MAX_POSITIONS, MIN_POSITIONS = 64, 8
"""Bounds of the positions of a unit, the part of a prefill chunk that a thread computes for one key/value head at a
time. Each unit packs the keys that it sees; with too many positions, its buffers do not fit into the L2 cache."""

UNITS_PER_THREAD = 8
"""Units are made smaller until each thread has this many, so that all end at about the same time."""

SERIAL_KEYS = 512
"""Number of keys, over all single rows, up to which one thread is faster than several, which have to be woken."""

SERIAL_PAIRS = 4096
"""The same for the pairs of a row and a key that it sees, over all prefill chunks."""


@dataclass(frozen=True, slots=True)
class KernelRows:
    """One step's rows, in the form that the kernels take; the same for all layers.

    Attributes:
        slots, starts, lengths: Arguments of ``attend_rows`` and ``attend_tiles``, for every row of the flat batch.
        rows: The rows that ``attend_rows`` computes.
        bounds: Each thread's part of ``rows``.
        units: The ``units`` of ``attend_tiles``.
        unit_bounds: Each thread's part of ``units``.
        max_positions: Most positions of a unit.
    """

    slots: npt.NDArray[np.int32]
    starts: Integers
    lengths: Integers
    rows: Integers
    bounds: Integers
    units: Integers
    unit_bounds: Integers
    max_positions: int

    @property
    def num_threads(self) -> int:
        """The number of threads that compute the step."""
        return len(self.bounds) - 1

    @property
    def row_arguments(self) -> tuple[object, ...]:
        """The arguments of ``attend_rows`` that are the same for all layers."""
        return self.slots, self.starts, self.lengths, self.rows, self.bounds

    @property
    def tile_arguments(self) -> tuple[object, ...]:
        """The arguments of ``attend_tiles`` that are the same for all layers."""
        return self.slots, self.starts, self.lengths, self.units, self.unit_bounds, self.max_positions


class HeadNorms(NamedTuple):
    """The ``row_kernels.rms_norm`` of query and key heads before the rotation.

    Attributes:
        query_weight: [head_dim]; [0] for no norm.
        key_weight: [head_dim]; [0] for no norm.
    """

    query_weight: Weights = NO_WEIGHT
    key_weight: Weights = NO_WEIGHT
    eps: float = 0.0
    rounds_first: bool = False


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer's attention, with the arguments that are the same in every step.

    Attributes:
        index: The layer.
        call: The layer's scale, window, cap and sinks.
        num_heads: Query heads.
        arguments: The arguments of ``decode_kernel.rotate_and_attend`` from ``keys`` on.
    """

    index: int
    call: AttentionCall
    num_heads: int
    arguments: tuple[object, ...]


class CPUBackend(AttentionBackend):
    """``decode_kernel`` for single rows, and ``prefill_kernel`` for the rows of prefill chunks.

    Args:
        cache: A cache on the CPU, in float32 or bfloat16.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        set_num_threads(torch.get_num_threads())
        self._num_threads: int = numba.get_num_threads()
        layers = (cache.layer(layer) for layer in range(cache.spec.num_layers))
        self._arrays = [(elements(keys), elements(values)) for keys, values in layers]
        self._rows: KernelRows
        self._new_slots: Integers
        self._rotations: dict[int, tuple[Positions, tuple[Weights, Weights]]] = {}

    def compile(self) -> None:
        """Compile the kernels for this cache, or read them from the disk cache.

        Raises:
            Exception: Of any kind, if Numba or LLVM fail.
        """
        spec, slots = self.cache.spec, np.zeros(TILE_KEYS, np.int32)
        zero, one, none = np.zeros(1, np.int64), np.ones(1, np.int64), AttentionCall(1.0)
        for parts in (1, 2):
            bounds = np.array([0] * parts + [1])
            self._rows = KernelRows(slots, zero, one, zero, bounds, np.array([[0, 1, 0]]), bounds, max_positions=1)
            self._new_slots = zero
            query = torch.zeros(spec.num_kv_heads, 1, spec.head_dim, dtype=spec.dtype)
            projected = torch.zeros(1, 1, 3 * query.numel(), dtype=spec.dtype)
            angles = torch.zeros(1, 1, spec.head_dim, dtype=spec.dtype)
            self._attend(query.transpose(0, 1).contiguous(), 0, none, torch.empty_like(query))
            layer = self.layer(0, none, spec.num_kv_heads, HeadNorms())
            self._rotate_and_attend(projected, (angles, angles), layer, query.reshape(1, 1, -1))
            self._rotations.clear()

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set the metadata of the next forward pass, and divide its rows among the threads."""
        super().begin(metadata)
        num_kv_heads = self.cache.spec.num_kv_heads
        self._rows = divide_rows(metadata.groups, metadata.block_size, self._num_threads, num_kv_heads)
        self._new_slots = metadata.slot_mapping.numpy()
        self._rotations.clear()

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """One kernel call for all single rows, one for all prefill chunks; see the base class."""
        own = query.transpose(0, 1).contiguous()
        out = torch.empty_like(own)
        self._attend(own, layer, call, out)
        return out

    def layer(self, index: int, call: AttentionCall, num_heads: int, norms: HeadNorms) -> AttentionLayer:
        """The arguments of ``rotate_and_attend`` for one layer."""
        arguments = (*self._arrays[index], num_heads, *norms, *_call_arguments(call))
        return AttentionLayer(index, call, num_heads, arguments)

    def rotate_and_attend(
        self, projected: torch.Tensor, positions: Positions, layer: AttentionLayer, out: torch.Tensor
    ) -> None:
        """Rotate queries and keys, store keys and values, and attend.

        Args:
            projected: [1, rows, (heads + 2 * kv_heads) * head_dim], contiguous: each row's queries, keys, values;
                overwritten.
            positions: The rotation of each row.
            layer: The layer, from ``layer``.
            out: [1, rows, heads * head_dim], contiguous, overwritten.

        Raises:
            NotImplementedError: If the positions have another shape or dtype.
        """
        self.metadata(layer.index)
        self._rotate_and_attend(projected, positions, layer, out)

    def _rotate_and_attend(
        self, projected: torch.Tensor, positions: Positions, layer: AttentionLayer, out: torch.Tensor
    ) -> None:
        plan, num_rows = self._rows, projected.shape[1]
        (rotate_and_attend if plan.num_threads == 1 else rotate_and_attend_in_parallel)(
            projected.data_ptr(),
            out.data_ptr(),
            num_rows,
            plan.num_threads,
            *self._rotation(positions, num_rows, projected.dtype),
            self._new_slots,
            *plan.row_arguments,
            *layer.arguments,
        )
        if len(plan.units):
            heads = out[0].view(num_rows, layer.num_heads, -1)
            self._attend_tiles(elements(projected[0]), layer.index, layer.call, elements(heads))

    def _rotation(self, positions: Positions, num_rows: int, dtype: torch.dtype) -> tuple[Weights, Weights]:
        """Cosines and sines for the kernel, [rows, head_dim] each; computed once per step."""
        known = self._rotations.get(id(positions))
        if known is None:
            for part in positions:
                if part.shape != (1, num_rows, self.cache.spec.head_dim) or part.dtype != dtype:
                    raise NotImplementedError(f"rotary positions of shape {tuple(part.shape)}, {part.dtype}")
            cos, sin = (part[0].float().contiguous().numpy() for part in positions)
            # The positions are kept too, so that no other object gets the same id.
            known = self._rotations[id(positions)] = positions, (cos, sin)
        return known[1]

    def _attend(self, query: torch.Tensor, layer: int, call: AttentionCall, out: torch.Tensor) -> None:
        """Queries and results are [rows, heads, head_dim]."""
        plan, queries = self._rows, elements(query).reshape(len(query), -1)
        if len(plan.rows):
            (attend_rows if plan.num_threads == 1 else attend_rows_in_parallel)(
                queries, *self._arrays[layer], *plan.row_arguments, *_call_arguments(call), elements(out)
            )
        if len(plan.units):
            self._attend_tiles(queries, layer, call, elements(out))

    def _attend_tiles(self, query: Elements, layer: int, call: AttentionCall, out: Elements) -> None:
        """The arguments of ``prefill_kernel.attend_tiles``."""
        plan = self._rows
        (attend_tiles if plan.num_threads == 1 else attend_tiles_in_parallel)(
            query, *self._arrays[layer], *plan.tile_arguments, *_call_arguments(call), out
        )


def make_backend(cache: KVCache) -> AttentionBackend:
    """The fastest backend for the cache's dtype."""
    if cache.spec.dtype not in KINDS:
        return SDPABackend(cache)
    backend = CPUBackend(cache)
    try:
        backend.compile()
    except Exception:  # of any kind, from Numba or LLVM: torch's attention is the fallback
        logger.warning(
            "the attention kernels cannot be compiled for this processor; using torch's attention", exc_info=True
        )
        return SDPABackend(cache)
    return backend


def _call_arguments(call: AttentionCall) -> tuple[float, int, float, Weights]:
    """Scale, window, softcap and sinks, in the form that the kernels take."""
    sinks = NO_WEIGHT if call.sinks is None else call.sinks.detach().float().numpy()
    return call.scale, call.window or 0, call.softcap or 0.0, sinks


def divide_rows(groups: Sequence[Rows], block_size: int, num_threads: int, num_kv_heads: int) -> KernelRows:
    """Find the slots of each row's keys, and divide the rows among threads by the number of keys (longest first).

    Args:
        groups: The rows of the flat batch.
        block_size: Positions in a block.
        num_threads: Threads at most; few rows are left to one.
        num_kv_heads: Key/value heads of a layer.
    """
    starts, lengths = np.zeros((2, groups[-1].stop), np.int64)
    slots: list[Integers] = []
    chunks: list[Rows] = []
    rows: list[tuple[int, int]] = []
    first_slot = 0
    for group in groups:
        seen = group.query_positions.numpy() + 1
        is_chunk = seen.shape[1] > 1
        totals = seen[:, -1] + (TILE_KEYS if is_chunk else LANES) - 1
        ends = first_slot + np.cumsum(totals)
        # A sequence's padding slots repeat its last position.
        seq = np.repeat(np.arange(len(totals)), totals)
        position = np.arange(first_slot, ends[-1]) - (ends - totals)[seq]
        position = np.minimum(position, seen[seq, -1] - 1)
        slots.append(group.tables.numpy()[seq, position // block_size] * block_size + position % block_size)
        starts[group.start : group.stop] = np.repeat(ends - totals, seen.shape[1])
        lengths[group.start : group.stop] = seen.reshape(-1)
        first_slot = int(ends[-1])
        if is_chunk:
            chunks.append(group)
        else:  # decodes, and the last position of a prefill, which may come after longer chunks
            rows += zip(seen[:, 0].tolist(), range(group.start, group.stop), strict=True)
    num_keys = sum(keys for keys, _ in rows)
    if num_keys <= SERIAL_KEYS and int(lengths.sum()) - num_keys <= SERIAL_PAIRS:
        num_threads = 1
    positions = (len(lengths) - len(rows)) * num_kv_heads // (UNITS_PER_THREAD * num_threads)
    positions = min(max(positions, MIN_POSITIONS), MAX_POSITIONS)
    units = [
        (int(lengths[first:stop].sum()), (first, stop, head))
        for chunk in chunks
        for first in range(chunk.start, chunk.stop, positions)
        for stop in [min(first + positions, chunk.stop)]
        for head in range(num_kv_heads)
    ]
    divided_rows, bounds = balance(rows, num_threads)
    divided_units, unit_bounds = balance(units, num_threads)
    return KernelRows(
        slots=np.concatenate(slots).astype(np.int32),
        starts=starts,
        lengths=lengths,
        rows=np.array(divided_rows, np.int64),
        bounds=bounds,
        units=np.array(divided_units, np.int64).reshape(-1, 3),
        unit_bounds=unit_bounds,
        max_positions=positions,
    )


def balance(items: Sequence[tuple[int, Item]], num_threads: int) -> tuple[list[Item], Integers]:
    """Divide items, given their costs, among threads: the items in order, and the bounds of each thread's part."""
    shares: list[list[Item]] = [[] for _ in range(num_threads)]
    loads = [(0, thread) for thread in range(num_threads)]
    for cost, item in sorted(items, key=lambda pair: -pair[0]):
        load, thread = loads[0]
        shares[thread].append(item)
        heapq.heapreplace(loads, (load + cost, thread))
    return [item for share in shares for item in share], np.cumsum([0, *map(len, shares)])
