"""The key/value tensors and their sizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from server.engine.attention.transfers import queue_copy, to_device


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The shape of one model's keys and values.

    Attributes:
        num_layers: Layers that hold keys and values.
        num_kv_heads: Key/value heads of each.
        head_dim: Width of a head.
        block_size: Positions in a block.
        dtype: Element type.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def token_width(self) -> int:
        """Numbers of one position over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of one position over all layers, keys and values."""
        return self.token_width * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.block_size * self.token_bytes


class KVCache:
    """Keys and values of every layer, in blocks.

    Attributes:
        tensor: [2 (keys, values), layers, num_blocks + 1, block_size, kv_heads, head_dim].
        spare_block: The last block, which no sequence owns: padding rows write there.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        self.spec = spec
        self._device = device
        self._allocate(num_blocks)

    def resize(self, num_blocks: int) -> None:
        """Replace the blocks by another number of blocks of zeros, at another address.

        CUDA graphs that were recorded before use the old address.
        """
        del self.tensor, self._slots, self._layers  # first, because both sizes may not fit
        self._allocate(num_blocks)

    def _allocate(self, num_blocks: int) -> None:
        spec = self.spec
        self.num_blocks = self.spare_block = num_blocks
        # The content does not matter, but writing zeros allocates all the memory now, not during serving.
        self.tensor = torch.zeros(
            (2, spec.num_layers, num_blocks + 1, spec.block_size, spec.num_kv_heads, spec.head_dim),
            dtype=spec.dtype,
            device=self._device,
        )
        shape = (2, spec.num_layers, (num_blocks + 1) * spec.block_size, spec.num_kv_heads, spec.head_dim)
        self._slots = self.tensor.view(shape)
        self._layers = [(self._slots[0, layer], self._slots[1, layer]) for layer in range(spec.num_layers)]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer by slot, each [(num_blocks + 1) * block_size, kv_heads, head_dim].

        Slot ``block * block_size + i`` is position i of a block.
        """
        return self._layers[index]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of every layer, given (source, destination) pairs."""
        if copies:
            source, destination = to_device(copies, self.tensor.device).unbind(1)
            self.tensor[:, :, destination] = self.tensor[:, :, source]

    def fill(self, blocks: Sequence[int], rows: torch.Tensor) -> None:
        """Write a key/value prefix into blocks.

        Args:
            blocks: The blocks for its tokens, in order.
            rows: [tokens, layers * 2 * kv_heads * head_dim], in PEFT's order: per token K0 V0 K1 V1 ..., with
                positions and norms applied to the keys (peft.tuners.prefix_tuning).
        """
        self.write(self.slots(blocks)[: len(rows)], queue_copy(rows, self.tensor.device))

    def slots(self, blocks: Sequence[int]) -> torch.Tensor:
        """All slots of some blocks, in order: [blocks * block_size] int64 on the device."""
        starts = to_device(blocks, self.tensor.device) * self.spec.block_size
        return (starts[:, None] + torch.arange(self.spec.block_size, device=starts.device)).flatten()

    def write(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows of a key/value prefix, which are on the device, into slots.

        Args:
            slots: [tokens] int64.
            rows: [tokens, layers * 2 * kv_heads * head_dim], in the order of ``fill``.
        """
        spec = self.spec
        key_values = rows.to(self.tensor).view(len(rows), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        self._slots[:, :, slots] = key_values.permute(2, 1, 0, 3, 4)

    def are_finite(self, blocks: Sequence[int]) -> torch.Tensor:
        """Whether the keys and values of all layers are finite at each position of some blocks: [blocks, block_size].

        Does not wait for the device.
        """
        gathered = self.tensor.index_select(2, to_device(blocks, self.tensor.device))
        # A maximum with a NaN is NaN, and NaN < inf is false.
        return gathered.abs_().amax(dim=(0, 1, 4, 5)) < torch.inf


def min_blocks(spec: KVCacheSpec, max_model_len: int) -> int:
    """Blocks that one sequence of ``max_model_len`` positions needs, with the copy of a soft prompt's last block."""
    return -(-max_model_len // spec.block_size) + 1


def max_blocks(spec: KVCacheSpec, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks that ``max_num_seqs`` sequences of ``max_model_len`` positions and as many soft prompts could use."""
    return 2 * max_num_seqs * min_blocks(spec, max_model_len)


def num_blocks_for(
    spec: KVCacheSpec,
    *,
    memory: int | None,
    free_memory: Callable[[], tuple[int, float]],
    max_model_len: int,
    max_num_seqs: int,
) -> int:
    """The number of blocks of the cache.

    Args:
        spec: The shape of a block.
        memory: Bytes to use; None for a fraction of the free memory, at most ``max_blocks``.
        free_memory: Returns the free bytes of the device, with the model loaded, and the fraction to use.
        max_model_len: Positions of one sequence.
        max_num_seqs: Sequences that run at once.

    Raises:
        ValueError: If one sequence of ``max_model_len`` positions does not fit; the message says what is missing.
    """
    blocks_per_seq = min_blocks(spec, max_model_len)
    if memory is None:
        free, fraction = free_memory()
        num_blocks = min(int(free * fraction) // spec.block_bytes, max_blocks(spec, max_model_len, max_num_seqs))
        what = f"{fraction:.0%} of the {free / 2**20:.0f} MiB that are free"
    else:
        num_blocks = memory // spec.block_bytes
        what = f"the {memory / 2**20:.0f} MiB of --kv-cache-memory"
    if num_blocks < blocks_per_seq:
        missing = (blocks_per_seq - num_blocks) * spec.block_bytes
        most = max_model_len - (blocks_per_seq - num_blocks) * spec.block_size
        fitting = f"; {most} positions would fit" if most > 0 else ""
        raise ValueError(
            f"one sequence of {max_model_len} positions needs {blocks_per_seq * spec.block_bytes / 2**20:.1f} MiB of "
            f"keys and values; {what} are {missing / 2**20:.1f} MiB too few: "
            f"raise --kv-cache-memory or lower --max-model-len{fitting}"
        )
    return num_blocks
