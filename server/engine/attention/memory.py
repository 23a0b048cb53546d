"""How the memory of a device is divided, and how much of it is left for keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.engine.attention.kv_cache import KVCacheSpec, max_blocks, min_blocks

GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The memory of a device at one moment, in bytes.

    Attributes:
        total: Memory of the device.
        free: What no process uses.
        allocated: Tensors of this process.
        reserved: What torch holds for this process; the tensors are part of it.
        peak: Maximum of ``allocated`` since the last ``DeviceMemory.settle``.
    """

    total: int
    free: int
    allocated: int
    reserved: int
    peak: int


class DeviceMemory(Protocol):
    """Reads the memory of a device."""

    def settle(self) -> MemoryReading:
        """Wait for the device, return unused memory to it, and start a new peak; then ``read``."""

    def read(self) -> MemoryReading:
        """The memory now."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What a server needs besides keys and values, in bytes; measured.

    Attributes:
        total: Memory of the device.
        outside: The rest of what is used: by the CUDA context, libraries and other processes.
        weights: The model, with all other tensors that stay.
        step: The tensors of the largest step at its peak.
        graphs: CUDA graphs.
        adapters: What is kept for adapters.
    """

    total: int
    outside: int
    weights: int
    step: int
    graphs: int
    adapters: int = 0

    @property
    def needed(self) -> int:
        """All but keys and values."""
        return self.outside + self.weights + self.step + self.graphs + self.adapters

    def num_blocks(self, spec: KVCacheSpec, *, utilization: float, max_model_len: int, max_num_seqs: int) -> int:
        """The number of blocks in the rest of the memory, at most ``max_blocks``.

        Args:
            spec: The shape of a block.
            utilization: The fraction of ``total`` that may be used, in (0, 1].
            max_model_len: Positions of one sequence.
            max_num_seqs: Sequences that run at once.

        Raises:
            ValueError: If one sequence of ``max_model_len`` positions does not fit; the message says what is needed,
                what there is, and which flags help.
        """
        usable = int(self.total * utilization)
        num_blocks = (usable - self.needed) // spec.block_bytes - 1  # the spare block
        least = min_blocks(spec, max_model_len)
        if num_blocks < least:
            keys_and_values = (least + 1) * spec.block_bytes
            raise ValueError(
                f"one sequence of {max_model_len} positions needs {_gib(self.needed + keys_and_values)}: {self}, "
                f"{_gib(keys_and_values)} for keys and values; {_gib(usable)} may be used, {utilization:g} of "
                f"{_gib(self.total)}: raise --gpu-memory-utilization, or lower --max-model-len, "
                f"--max-num-batched-tokens{', --adapter-device-memory' if self.adapters else ''} or --max-num-seqs"
            )
        return min(num_blocks, max_blocks(spec, max_model_len, max_num_seqs))

    def __str__(self) -> str:
        adapters = f"{_gib(self.adapters)} for adapters, " if self.adapters else ""
        return (
            f"{_gib(self.weights)} for the weights, {_gib(self.step)} for the largest step, {_gib(self.graphs)} for "
            f"CUDA graphs, {adapters}{_gib(self.outside)} outside of torch (CUDA and other processes)"
        )

    def summary(self, spec: KVCacheSpec, num_blocks: int) -> str:
        """One line that divides the memory, with a cache of some blocks."""
        return (
            f"memory: {_gib(self.total)} in total: {self}, {_gib(num_blocks * spec.block_bytes)} for keys and values "
            f"of {num_blocks * spec.block_size} tokens"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
