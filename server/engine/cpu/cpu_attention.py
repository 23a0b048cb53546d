"""The CPU's attention: rows that see few keys read them in place, long prefills go to torch's SDPA."""

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
"""Cosines and sines of [1, rows, head_dim] each, as the models make them once a pass."""

MOST_KEYS = 512
"""Chunks that see more go to SDPA. Up to here single rows are quicker, for SDPA needs keys, masks and results laid
out for it; beyond, what either saves is small beside the products."""

UNIT_ROWS = 16
"""Rows of a chunk that one thread takes together; they read the same keys."""

SERIAL_KEYS = 512
"""Up to so many, over all rows, one thread is quicker than several, which have to be woken."""


@dataclass(frozen=True, slots=True)
class KernelRows:
    """One step's rows as ``attend_rows`` takes them; the same for all layers.

    Attributes:
        slots: As in ``attend_rows``; so are the next four.
        starts: Of every row of the flat batch, whether it is taken or not.
        lengths: Likewise.
        rows: Those that are taken.
        bounds: Each thread's share of them.
        others: Indices of the groups whose rows are not.
    """

    slots: npt.NDArray[np.int32]
    starts: Integers
    lengths: Integers
    rows: Integers
    bounds: Integers
    others: list[int]

    @property
    def arguments(self) -> tuple[object, ...]:
        """Those of ``attend_rows`` that are the same for all layers."""
        return self.slots, self.starts, self.lengths, self.rows, self.bounds


class HeadNorms(NamedTuple):
    """How heads are normalised before they are rotated.

    Attributes:
        query_weight: [head_dim], as in ``row_kernels.rms_norm``; [0] for none.
        key_weight: Likewise.
        eps: As in ``row_kernels.rms_norm``.
        rounds_first: Likewise.
    """

    query_weight: Weights = NO_WEIGHT
    key_weight: Weights = NO_WEIGHT
    eps: float = 0.0
    rounds_first: bool = False


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer's attention, with what stays the same from step to step at hand.

    Attributes:
        index: Its number.
        call: What it asks for.
        num_heads: Of its queries.
        arguments: Those of ``decode_kernel.rotate_and_attend`` from the keys on.
    """

    index: int
    call: AttentionCall
    num_heads: int
    arguments: tuple[object, ...]


class CPUBackend(SDPABackend):
    """SDPA for chunks that see many keys, and ``decode_kernel`` for all other rows.

    Args:
        cache: Keys and values in float32 or bfloat16, on the CPU.
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
        """Compile the kernels for this cache, or read them from the disk.

        Raises:
            Exception: Whatever Numba and LLVM raise where they cannot.
        """
        spec, slots = self.cache.spec, np.zeros(LANES, np.int32)
        zero, one, none = np.zeros(1, np.int64), np.ones(1, np.int64), AttentionCall(1.0)
        for parts in (1, 2):
            bounds = np.array([0] * parts + [1])
            self._rows = KernelRows(slots, zero, one, zero, bounds, others=[])
            self._new_slots = zero
            query = torch.zeros(spec.num_kv_heads, 1, spec.head_dim, dtype=spec.dtype)
            projected = torch.zeros(1, 1, 3 * query.numel(), dtype=spec.dtype)
            angles = torch.zeros(1, 1, spec.head_dim, dtype=spec.dtype)
            self._attend_rows(query.transpose(0, 1).contiguous(), 0, none, torch.empty_like(query))
            layer = self.layer(0, none, spec.num_kv_heads, HeadNorms())
            self._rotate_and_attend(projected, (angles, angles), layer, torch.empty_like(query))
            self._rotations.clear()

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set what the next forward pass attends to, and share its rows out to the threads."""
        super().begin(metadata)
        self._rows = share_out(metadata.groups, metadata.block_size, self._num_threads)
        self._new_slots = metadata.slot_mapping.numpy()
        self._rotations.clear()

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """Most rows in one call of the kernel, long chunks as in SDPABackend; shapes as in the base class."""
        own = query.transpose(0, 1).contiguous()
        out = torch.empty_like(own)
        if len(self._rows.rows):
            self._attend_rows(own, layer, call, out)
        self._attend_others(query, layer, metadata, call, out)
        return out

    def layer(self, index: int, call: AttentionCall, num_heads: int, norms: HeadNorms) -> AttentionLayer:
        """A layer whose queries, keys and values come from one product; made once."""
        return AttentionLayer(index, call, num_heads, (*self._arrays[index], num_heads, *norms, *_of(call)))

    def rotate_and_attend(
        self, projected: torch.Tensor, positions: Positions, layer: AttentionLayer, out: torch.Tensor
    ) -> None:
        """Rotate queries and keys, store keys and values, attend.

        Args:
            projected: [1, rows, (heads + 2 * kv_heads) * head_dim], contiguous: each row's queries, keys, values;
                overwritten.
            positions: To rotate by.
            layer: Whose they are.
            out: [1, rows, heads * head_dim], contiguous, overwritten.

        Raises:
            NotImplementedError: If the positions have another shape or dtype.
        """
        metadata = self.metadata(layer.index)
        self._rotate_and_attend(projected, positions, layer, out)
        if self._rows.others:
            heads = out[0].view(out.shape[1], layer.num_heads, -1)
            query = projected[0, :, : out.shape[-1]].view(heads.shape).transpose(0, 1)
            self._attend_others(query, layer.index, metadata, layer.call, heads)

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
        """Cosines and sines for the kernel, [rows, head_dim] each; made once a step."""
        known = self._rotations.get(id(positions))
        if known is None:
            for part in positions:
                if part.shape != (1, num_rows, self.cache.spec.head_dim) or part.dtype != dtype:
                    raise NotImplementedError(f"rotary positions of shape {tuple(part.shape)}, {part.dtype}")
            cos, sin = (part[0].float().contiguous().numpy() for part in positions)
            # With the positions themselves, or others could come to lie at their address.
            known = self._rotations[id(positions)] = positions, (cos, sin)
        return known[1]

    def _attend_rows(self, query: torch.Tensor, layer: int, call: AttentionCall, out: torch.Tensor) -> None:
        """Queries and results are [rows, heads, head_dim]."""
        plan = self._rows
        (attend_rows if len(plan.bounds) == 2 else attend_rows_in_parallel)(
            elements(query).reshape(len(query), -1),
            *self._arrays[layer],
            *plan.arguments,
            *_of(call),
            elements(out),
        )

    def _attend_others(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall, out: torch.Tensor
    ) -> None:
        for index in self._rows.others:
            start, stop = metadata.groups[index].start, metadata.groups[index].stop
            out[start:stop] = self.attend_group(query[:, start:stop], layer, metadata, index, call)


def make_backend(cache: KVCache) -> AttentionBackend:
    """The fastest backend for the cache's dtype."""
    if cache.spec.dtype not in KINDS:
        return SDPABackend(cache)
    backend = CPUBackend(cache)
    try:
        backend.compile()
    except Exception:  # whatever Numba or LLVM lacks here, there is a slower way
        logger.warning(
            "the attention kernels cannot be compiled for this processor; using torch's attention", exc_info=True
        )
        backend.close()
        return SDPABackend(cache)
    return backend


def _of(call: AttentionCall) -> tuple[float, int, float, Weights]:
    """What the kernels take of a call."""
    sinks = NO_WEIGHT if call.sinks is None else call.sinks.detach().float().numpy()
    return call.scale, call.window or 0, call.softcap or 0.0, sinks


def share_out(groups: Sequence[Rows], block_size: int, num_threads: int) -> KernelRows:
    """Find each row's keys, and give each thread about as many of them to read, the largest shares first."""
    starts, lengths = np.zeros((2, groups[-1].stop), np.int64)
    slots: list[Integers] = []
    units: list[tuple[int, int, int]] = []
    others: list[int] = []
    first_slot = 0
    for index, group in enumerate(groups):
        seen = group.query_positions.numpy() + 1
        if seen.shape[1] > 1 and seen[0, -1] > MOST_KEYS:
            others.append(index)
            continue
        totals = seen[:, -1] + LANES - 1
        ends = first_slot + np.cumsum(totals)
        # What follows a sequence is its own last position, once more.
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
        others=others,
    )
