"""Attention on GPUs: Triton kernels that read keys and values in place."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from server.engine.attention.backend import AttentionBackend, AttentionCall, AttentionMetadata, Rows
from server.engine.attention.kv_cache import KVCache
from server.engine.cuda.triton_launcher import use_prebuilt

MAX_SHARES = 32
"""Maximum number of programs that divide the keys of one tile; a power of two."""

MIN_KEYS_OF_SHARE = 256
"""Minimum number of keys per program; with fewer, combining the shares costs more than it saves."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs that keep one multiprocessor of the GPU busy."""

LANES_OF_CHUNK = 64
"""Rows times query heads per key/value head in a tile of a prefill chunk; half as many for wide heads."""


def load_kernels() -> ModuleType:
    """Import the kernels' module; late, because it imports Triton.

    Raises:
        ImportError: If Triton is not installed.
    """
    use_prebuilt()
    return importlib.import_module("server.engine.cuda.triton_kernels")


class TritonBackend(AttentionBackend):
    """Paged attention for decodes and prefill chunks, without gathering keys.

    A launch depends on the tensors' shapes only, so a CUDA graph may record it.

    Args:
        cache: On a CUDA device; on any device in Triton's interpreter.
        num_processors: Multiprocessors of the GPU.

    Raises:
        ImportError: If Triton is not installed.
    """

    def __init__(self, cache: KVCache, num_processors: int = 4) -> None:
        self._kernels = load_kernels()
        super().__init__(cache)
        spec = cache.spec
        self._dims = max(16, _power_of_two(spec.head_dim))
        # Tiles of keys and of values have to fit into shared memory, twice if they are prefetched.
        tile_bytes = 64 * self._dims * spec.dtype.itemsize
        self._tile_keys = 64 if tile_bytes <= 2**14 else 32
        self._chunk_lanes = LANES_OF_CHUNK if tile_bytes <= 2**14 else LANES_OF_CHUNK // 2
        self._options = {"num_warps": 4, "num_stages": 2 if tile_bytes <= 2**15 else 1}
        self._num_programs = num_processors * PROGRAMS_PER_PROCESSOR

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
        """One or two launches for all decodes, and for each prefill chunk; see the base class."""
        num_heads, num_rows, head_dim = query.shape
        query = query if query.stride(-1) == 1 else query.contiguous()
        out = query.new_empty(num_rows, num_heads, head_dim)
        for rows in metadata.groups:
            self._attend_group(query[:, rows.start : rows.stop], layer, rows, call, out[rows.start : rows.stop])
        return out

    def num_shares(self, num_tiles: int, num_keys: int) -> int:
        """Number of programs that divide the keys of a tile.

        Args:
            num_tiles: Tiles of all key/value heads.
            num_keys: Maximum number of keys of a tile, from the shape of the block tables.
        """
        return max(1, min(self._num_programs // num_tiles, num_keys // MIN_KEYS_OF_SHARE, MAX_SHARES))

    def _attend_group(
        self, query: torch.Tensor, layer: int, rows: Rows, call: AttentionCall, out: torch.Tensor
    ) -> None:
        spec = self.cache.spec
        keys, values = self.cache.layer(layer)
        num_heads, num_rows, head_dim = query.shape
        num_seqs, rows_per_seq = rows.query_positions.shape
        group_size = num_heads // spec.num_kv_heads
        tile_rows = 1 if rows_per_seq == 1 else max(1, self._chunk_lanes // group_size)
        tiles_per_seq = -(-rows_per_seq // tile_rows)
        num_tiles = num_seqs * tiles_per_seq
        num_shares = self.num_shares(num_tiles * spec.num_kv_heads, rows.tables.shape[1] * spec.block_size)
        if num_shares > 1:
            scratch = torch.empty(num_rows * num_heads * num_shares * (head_dim + 2), device=query.device)
            sizes = [num_rows * num_heads * num_shares * width for width in (head_dim, 1, 1)]
            parts, maxima, sums = torch.split(scratch, sizes)
        else:
            parts = maxima = sums = out  # the kernel does not write to these
        self._kernels.attend[(num_tiles, spec.num_kv_heads, num_shares)](
            query,
            keys,
            values,
            rows.tables,
            rows.query_positions,
            out if call.sinks is None else call.sinks,
            out,
            parts,
            maxima,
            sums,
            call.scale,
            call.softcap or 1.0,
            call.window or 0,
            rows_per_seq,
            tiles_per_seq,
            *query.stride()[:2],
            *rows.tables.stride(),
            rows.query_positions.stride(0),
            NUM_KV_HEADS=spec.num_kv_heads,
            GROUP_SIZE=group_size,
            HEAD_DIM=head_dim,
            DIMS=self._dims,
            BLOCK_SIZE=spec.block_size,
            TILE_ROWS=tile_rows,
            LANES=max(16, _power_of_two(tile_rows * group_size)),
            TILE_KEYS=self._tile_keys,
            HAS_SOFTCAP=call.softcap is not None,
            HAS_SINKS=call.sinks is not None,
            IS_SPLIT=num_shares > 1,
            **self._options,
        )
        if num_shares > 1:
            self._kernels.combine[(num_rows * num_heads,)](
                parts,
                maxima,
                sums,
                out,
                num_shares,
                HEAD_DIM=head_dim,
                DIMS=self._dims,
                MAX_SHARES=MAX_SHARES,
                num_warps=4,
            )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least a number."""
    return 1 << (number - 1).bit_length()
