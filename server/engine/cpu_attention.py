"""The CPU's attention: rows that see few keys read them in place, long prefills go to torch's SDPA."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import torch

from server.engine.attention import AttentionBackend, AttentionCall, AttentionMetadata, Rows, SDPABackend
from server.engine.compiled import elements, set_num_threads
from server.engine.decode_kernel import attend_rows
from server.engine.kv_cache import KVCache
from server.engine.vector_code import LANES

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

_NO_SINKS = np.empty(0, np.float32)


MOST_KEYS = 512
"""Chunks that see more go to SDPA. Up to here single rows are quicker, for SDPA needs keys, masks and results laid
out for it; beyond, what either saves is small beside the products."""

UNIT_ROWS = 16
"""Rows of a chunk that one thread takes together; they read the same keys."""


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

    def compile(self) -> None:
        """Compile the kernel for this cache, or read it from the disk.

        Raises:
            Exception: Whatever Numba and LLVM raise where they cannot.
        """
        keys, values = self._arrays[0]
        out = np.empty((1, *keys.shape[1:]), keys.dtype)
        zero, one, parts = np.zeros(1, np.int64), np.ones(1, np.int64), np.array([0, 1])
        slots, factor = np.zeros(LANES, np.int32), np.float32(1.0)
        attend_rows(
            out.copy(), keys, values, slots, zero, one, zero, parts, factor, 0, np.float32(0.0), _NO_SINKS, out
        )

    def begin(self, metadata: AttentionMetadata) -> None:
        """Set what the next forward pass attends to, and share its rows out to the threads."""
        super().begin(metadata)
        self._rows = share_out(metadata.groups, metadata.block_size, self._num_threads)

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        """Most rows in one call of the kernel, long chunks as in SDPABackend; shapes as in the base class."""
        plan, own = self._rows, query.transpose(0, 1).contiguous()
        out = torch.empty_like(own)
        if len(plan.rows):
            attend_rows(
                elements(own),
                *self._arrays[layer],
                plan.slots,
                plan.starts,
                plan.lengths,
                plan.rows,
                plan.bounds,
                np.float32(call.scale),
                call.window or 0,
                np.float32(call.softcap or 0.0),
                _NO_SINKS if call.sinks is None else call.sinks.detach().float().numpy(),
                elements(out),
            )
        for index in plan.others:
            start, stop = metadata.groups[index].start, metadata.groups[index].stop
            out[start:stop] = self.attend_group(query[:, start:stop], layer, metadata, index, call)
        return out


def make_backend(cache: KVCache) -> AttentionBackend:
    """The fastest backend for the cache's device and dtype."""
    if cache.tensor.device.type != "cpu" or cache.spec.dtype not in {torch.float32, torch.bfloat16}:
        return SDPABackend(cache)
    backend = CPUBackend(cache)
    try:
        backend.compile()
    except Exception:  # whatever Numba or LLVM lacks here, there is a slower way
        logger.warning("attention cannot be compiled for this processor; torch's is used", exc_info=True)
        backend.close()
        return SDPABackend(cache)
    return backend


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
