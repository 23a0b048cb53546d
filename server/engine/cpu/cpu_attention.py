"""Attention on CPUs: a compiled kernel for rows that see few keys, torch's SDPA for long prefills."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch

from server.engine.attention.backend import AttentionBackend, AttentionCall, AttentionMetadata, Rows, SDPABackend
from server.engine.attention.kv_cache import KVCache
from server.engine.cpu.compiled import KINDS, elements, set_num_threads
from server.engine.cpu.decode_kernel import (
    attend_rows,
    attend_rows_in_parallel,
    rotate_and_attend,
    rotate_and_attend_in_parallel,
)
from server.engine.cpu.row_kernels import NO_WEIGHT, Weights
from server.engine.cpu.vector_code import LANES

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]
Positions = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [1, rows, head_dim] each, as the model computes them once per pass."""

MAX_KERNEL_KEYS = 512
"""Chunks that see more keys go to SDPA. With fewer, the kernel is faster, because SDPA needs gathered keys and masks;
with more, the difference is small beside the matrix products."""

UNIT_ROWS = 16
"""Rows of a chunk that are assigned to a thread together, because they read the same keys."""

SERIAL_KEYS = 512
"""Number of keys, over all rows, up to which one thread is faster than several, which have to be woken."""


@dataclass(frozen=True, slots=True)
class KernelRows:
    """One step's rows, in the form that ``attend_rows`` takes; the same for all layers.

    Attributes:
        slots, starts, lengths: The arguments of ``attend_rows``, for every row of the flat batch.
        rows: The rows that the kernel computes.
        bounds: Each thread's part of ``rows``.
        sdpa_groups: Indices of the groups that SDPA computes.
    """

    slots: npt.NDArray[np.int32]
    starts: Integers
    lengths: Integers
    rows: Integers
    bounds: Integers
    sdpa_groups: list[int]

    @property
    def arguments(self) -> tuple[object, ...]:
        """The arguments of ``attend_rows`` that are the same for all layers."""
        return self.slots, self.starts, self.lengths, self.rows, self.bounds


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


class CPUBackend(SDPABackend):
    """SDPA for chunks that see many keys, and ``decode_kernel`` for all other rows.

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
        spec, slots = self.cache.spec, np.zeros(LANES, np.int32)
        zero, one, none = np.zeros(1, np.int64), np.ones(1, np.int64), AttentionCall(1.0)
        for parts in (1, 2):
            bounds = np.array([0] * parts + [1])
            self._rows = KernelRows(slots, zero, one, zero, bounds, sdpa_groups=[])
            self._new_slots = zero
            query = torch.zeros(spec.num_kv_heads, 1, spec.head_dim, dtype=spec.dtype)
            projected = torch.zeros(1, 1, 3 * query.numel(), dtype=spec.dtype)
            angles = torch.zeros(1, 1, spec.head_dim, dtype=spec.dtype)
            self._attend_rows(query.transpose(0, 1).contiguous(), 0, none, torch.empty_like(query))
            layer = self.layer(0, none, spec.num_kv_heads, HeadNorms())
            self._rotate_and_attend(projected, (angles, angles), layer, torch.empty_like(query))
            self._rotations.clear()

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set the metadata of the next forward pass, and divide its rows among the threads."""
        super().begin(metadata)
        self._rows = divide_rows(metadata.groups, metadata.block_size, self._num_threads)
        self._new_slots = metadata.slot_mapping.numpy()
        self._rotations.clear()

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """One kernel call for most rows, SDPA for long chunks; see the base class."""
        own = query.transpose(0, 1).contiguous()
        out = torch.empty_like(own)
        if len(self._rows.rows):
            self._attend_rows(own, layer, call, out)
        self._attend_sdpa(query, layer, metadata, call, out)
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
        metadata = self.metadata(layer.index)
        self._rotate_and_attend(projected, positions, layer, out)
        if self._rows.sdpa_groups:
            heads = out[0].view(out.shape[1], layer.num_heads, -1)
            query = projected[0, :, : out.shape[-1]].view(heads.shape).transpose(0, 1)
            self._attend_sdpa(query, layer.index, metadata, layer.call, heads)

    def _rotate_and_attend(
        self, projected: torch.Tensor, positions: Positions, layer: AttentionLayer, out: torch.Tensor
    ) -> None:
        plan, num_rows = self._rows, projected.shape[1]
        num_parts = max(1, len(plan.bounds) - 1)
        (rotate_and_attend if num_parts == 1 else rotate_and_attend_in_parallel)(
            projected.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_parts,
            *self._rotation(positions, num_rows, projected.dtype),
            self._new_slots,
            *plan.arguments,
            *layer.arguments,
        )

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

    def _attend_rows(self, query: torch.Tensor, layer: int, call: AttentionCall, out: torch.Tensor) -> None:
        """Queries and results are [rows, heads, head_dim]."""
        plan = self._rows
        (attend_rows if len(plan.bounds) == 2 else attend_rows_in_parallel)(
            elements(query).reshape(len(query), -1),
            *self._arrays[layer],
            *plan.arguments,
            *_call_arguments(call),
            elements(out),
        )

    def _attend_sdpa(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall, out: torch.Tensor
    ) -> None:
        for index in self._rows.sdpa_groups:
            start, stop = metadata.groups[index].start, metadata.groups[index].stop
            out[start:stop] = self.attend_group(query[:, start:stop], layer, metadata, index, call)


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


def divide_rows(groups: Sequence[Rows], block_size: int, num_threads: int) -> KernelRows:
    """Find the slots of each row's keys, and balance the number of keys per thread (longest first)."""
    starts, lengths = np.zeros((2, groups[-1].stop), np.int64)
    slots: list[Integers] = []
    units: list[tuple[int, int, int]] = []
    sdpa_groups: list[int] = []
    first_slot = 0
    for index, group in enumerate(groups):
        seen = group.query_positions.numpy() + 1
        if seen.shape[1] > 1 and seen[0, -1] > MAX_KERNEL_KEYS:
            sdpa_groups.append(index)
            continue
        totals = seen[:, -1] + LANES - 1
        ends = first_slot + np.cumsum(totals)
        # A sequence's padding slots repeat its last position.
        seq = np.repeat(np.arange(len(totals)), totals)
        position = np.arange(first_slot, ends[-1]) - (ends - totals)[seq]
        position = np.minimum(position, seen[seq, -1] - 1)
        slots.append(group.tables.numpy()[seq, position // block_size] * block_size + position % block_size)
        starts[group.start : group.stop] = np.repeat(ends - totals, seen.shape[1])
        lengths[group.start : group.stop] = seen.reshape(-1)
        first_slot = int(ends[-1])
        step = min(UNIT_ROWS, seen.shape[1])
        for row in range(group.start, group.stop, step):
            stop = min(row + step, group.stop)
            units.append((int(lengths[row:stop].sum()), row, stop))
    if sum(keys for keys, _, _ in units) <= SERIAL_KEYS:
        num_threads = 1
    shares: list[list[int]] = [[] for _ in range(min(num_threads, len(units)))]
    loads = [(0, thread) for thread in range(len(shares))]
    for keys, row, stop in sorted(units, key=lambda unit: -unit[0]):
        load, thread = loads[0]
        shares[thread].extend(range(row, stop))
        heapq.heapreplace(loads, (load + keys, thread))
    return KernelRows(
        slots=np.concatenate([*slots, np.empty(0, np.int64)]).astype(np.int32),
        starts=starts,
        lengths=lengths,
        rows=np.array([row for share in shares for row in share], np.int64),
        bounds=np.cumsum([0, *map(len, shares)]),
        sdpa_groups=sdpa_groups,
    )
