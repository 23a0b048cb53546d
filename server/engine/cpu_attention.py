"""The CPU's attention: decodes read their keys in place, prefills go to torch's SDPA."""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.core import config

from server.engine.attention import AttentionBackend, AttentionCall, AttentionMetadata, Rows, SDPABackend
from server.engine.compiled import elements
from server.engine.decode_kernel import attend_rows
from server.engine.kv_cache import KVCache
from server.engine.vector_code import LANES

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]

_NO_SINKS = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Decodes:
    """One step's decodes as ``attend_rows`` takes them; the same for all layers."""

    slots: npt.NDArray[np.int32]
    starts: Integers
    lengths: Integers
    rows: Integers
    bounds: Integers


class CPUBackend(SDPABackend):
    """SDPA for prefill chunks, and ``decode_kernel`` for all rows that stand alone.

    Args:
        cache: Keys and values in float32 or bfloat16, on the CPU.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        numba.set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        self._num_threads: int = numba.get_num_threads()
        layers = (cache.layer(layer) for layer in range(cache.spec.num_layers))
        self._arrays = [(elements(keys), elements(values)) for keys, values in layers]
        self._decodes: Decodes | None = None

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
        """Set what the next forward pass attends to, and share its decodes out to the threads."""
        super().begin(metadata)
        first = metadata.groups[0]
        is_decode = first.query_positions.shape[1] == 1
        self._decodes = share_out(first, metadata.block_size, self._num_threads) if is_decode else None

    def attend_group(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, index: int, call: AttentionCall
    ) -> torch.Tensor:
        """Decodes in one call of the kernel; everything else as in SDPABackend."""
        decodes = self._decodes
        if index > 0 or decodes is None:
            return super().attend_group(query, layer, metadata, index, call)
        rows = query.transpose(0, 1).contiguous()
        out = torch.empty_like(rows)
        attend_rows(
            elements(rows),
            *self._arrays[layer],
            decodes.slots,
            decodes.starts,
            decodes.lengths,
            decodes.rows,
            decodes.bounds,
            np.float32(call.scale),
            call.window or 0,
            np.float32(call.softcap or 0.0),
            _NO_SINKS if call.sinks is None else call.sinks.detach().float().numpy(),
            elements(out),
        )
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


def share_out(rows: Rows, block_size: int, num_threads: int) -> Decodes:
    """Find each row's keys, and give each thread about as many of them to read, the longest rows first."""
    lengths = rows.query_positions[:, 0].numpy() + 1
    ends = np.cumsum(lengths + LANES - 1)
    starts = ends - (lengths + LANES - 1)
    # What follows a sequence is its own last position, once more.
    row = np.repeat(np.arange(len(lengths)), lengths + LANES - 1)
    position = np.minimum(np.arange(ends[-1]) - starts[row], lengths[row] - 1)
    slots = rows.tables.numpy()[row, position // block_size] * block_size + position % block_size
    shares: list[list[int]] = [[] for _ in range(min(num_threads, len(lengths)))]
    loads = [(0, thread) for thread in range(len(shares))]
    for row in np.argsort(-lengths, kind="stable").tolist():
        load, thread = loads[0]
        shares[thread].append(row)
        heapq.heapreplace(loads, (load + int(lengths[row]), thread))
    bounds = np.cumsum([0, *map(len, shares)])
    order = np.concatenate([np.array(share) for share in shares])
    return Decodes(slots.astype(np.int32), starts, lengths, order, bounds)
