"""The connector in a worker: holds soft prompts in host memory, and copies them into the worker's blocks.

Prefixes are held as keys and values of the worker's own heads, and written by the attention backend's own function.
Computed soft prompts are held as copies of whole blocks. Neither needs to know a layout of the cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from server.engine.types import SoftPromptSource
from server.engine.vllm.residency import Read, Reported
from server.engine.vllm.scheduler_side import NULL_BLOCK, Commands, Load, Save

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of each soft prompt of keys and values that a worker holds.

    Attributes:
        num_layers: Layers of the whole model with keys and values.
        num_heads: Key/value heads of the whole model.
        head_dim: Width of a head.
        first_head: The worker's first head.
        num_own_heads: The worker's heads.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    first_head: int
    num_own_heads: int

    def cut(self, rows: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values [tokens, own heads, head_dim], of rows as they are in PEFT's file."""
        of_layer = rows.view(len(rows), self.num_layers, 2, self.num_heads, self.head_dim)[:, layer]
        own = of_layer[:, :, self.first_head : self.first_head + self.num_own_heads]
        return own[:, 0].contiguous(), own[:, 1].contiguous()


def shard_of(rank: int, world_size: int, *, num_layers: int, num_heads: int, head_dim: int) -> Shard:
    """The shard of a tensor-parallel rank; with fewer heads than ranks, heads are replicated."""
    return Shard(num_layers, num_heads, head_dim, rank * num_heads // world_size, max(1, num_heads // world_size))


def by_blocks(cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A view of a layer's cache whose first dimension counts the scheduler's blocks; a kernel may use smaller ones.

    Raises:
        ValueError: If the blocks are no multiples of the kernel's.
    """
    if len(cache) == num_blocks:
        return cache
    if not num_blocks or len(cache) % num_blocks:
        raise ValueError(f"a cache of {len(cache)} blocks does not divide into {num_blocks}")
    blocks: torch.Tensor = torch.unflatten(cache, 0, (num_blocks, len(cache) // num_blocks))
    return blocks


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One attention layer of this worker.

    Attributes:
        index: Its place among the model's layers.
        group: Its cache group.
        block_size: Positions of a block.
        cache: Its blocks; the first dimension counts them.
        write: Writes keys and values [tokens, heads, head_dim] into slots [tokens].
    """

    index: int
    group: int
    block_size: int
    cache: torch.Tensor
    write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Keys and values by layer index."""

    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks by layer index, and by cache group the place of each among the soft prompt's blocks."""

    layers: Mapping[int, torch.Tensor]
    places: Sequence[Mapping[int, int]]

    @property
    def nbytes(self) -> int:
        return sum(blocks.nbytes for blocks in self.layers.values())


class WorkerSide:
    """Carries out the scheduler side's commands.

    Args:
        shard: What this worker holds of a soft prompt of keys and values.
        read: Reads a file; returns rows in the serving dtype; called in a separate thread.
        pin_memory: Whether to hold soft prompts in page-locked memory, for copies to a GPU.
    """

    def __init__(
        self, shard: Shard, read: Callable[[SoftPromptSource], torch.Tensor], *, pin_memory: bool = False
    ) -> None:
        self._shard = shard
        self._read = read
        self._pin_memory = pin_memory
        self._layers: list[CacheLayer] = []
        self._held: dict[int, _Rows | _Blocks] = {}
        self._reading: set[int] = set()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="soft-prompt-reader")
        self._ended: SimpleQueue[tuple[int, _Rows | str, float]] = SimpleQueue()
        self._reported = Reported()
        self._failed: set[str] = set()
        self._closing = threading.Event()

    @property
    def num_held(self) -> int:
        """Soft prompts in memory."""
        return len(self._held)

    def register(self, layers: Sequence[CacheLayer]) -> None:
        """Take over the attention layers of the target model."""
        self._layers = list(layers)

    def before_step(self, commands: Commands) -> None:
        """Drop, start reads, and copy into blocks."""
        for ticket in commands.drops:
            self._held.pop(ticket, None)
            self._reading.discard(ticket)
        for read in commands.reads:
            self._reading.add(read.ticket)
            self._executor.submit(self._run, read)
        self._failed.update(commands.failed)
        for load in commands.loads:
            self._load(load)

    def after_step(self, commands: Commands) -> None:
        """Copy from blocks."""
        for save in commands.saves:
            began = time.perf_counter()
            try:
                held = self._copy(save)
            except Exception as error:  # such as too little memory: the requests that wait for it fail, no others
                logger.exception("a soft prompt cannot be kept")
                self._reported.failed[save.ticket] = f"{type(error).__name__}: {error}"
                continue
            self._keep(save.ticket, held, time.perf_counter() - began)

    def take_failed(self) -> set[str]:
        """Ids of requests to fail since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> Reported | None:
        """What has happened since the last call; None for nothing."""
        while True:
            try:
                ticket, result, seconds = self._ended.get_nowait()
            except Empty:
                break
            if ticket not in self._reading:  # dropped meanwhile
                continue
            self._reading.discard(ticket)
            if isinstance(result, str):
                self._reported.failed[ticket] = result
            else:
                self._keep(ticket, result, seconds)
        if not self._reported.loaded and not self._reported.failed:
            return None
        reported, self._reported = self._reported, Reported()
        return reported

    def close(self) -> None:
        """End the reading thread."""
        self._closing.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _keep(self, ticket: int, held: _Rows | _Blocks, seconds: float) -> None:
        self._held[ticket] = held
        self._reported.loaded[ticket] = 1, held.nbytes, seconds

    def _run(self, read: Read) -> None:
        """Read a file, in the reading thread."""
        began = time.perf_counter()
        try:
            rows = self._read(read.source)
            held = _Rows({layer.index: self._own(*self._shard.cut(rows, layer.index)) for layer in self._layers})
        except Exception as error:  # any damage of a file fails the requests that name it, and nothing else
            self._ended.put((read.ticket, str(error) or type(error).__name__, time.perf_counter() - began))
        else:
            self._ended.put((read.ticket, held, time.perf_counter() - began))

    def _own(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (keys.pin_memory(), values.pin_memory()) if self._pin_memory else (keys, values)

    def _load(self, load: Load) -> None:
        held = self._held[load.ticket]
        slots: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self._layers:
            ids = load.block_ids[layer.group]
            if isinstance(held, _Blocks):
                first = load.first // layer.block_size
                wanted = [place for place in range(first, len(ids)) if ids[place] != NULL_BLOCK]
                rows = [held.places[layer.group][place] for place in wanted]
                if wanted:
                    source = held.layers[layer.index][rows].to(layer.cache.device, non_blocking=True)
                    layer.cache[[ids[place] for place in wanted]] = source
                continue
            key = layer.group, layer.block_size, layer.cache.device
            if key not in slots:
                slots[key] = _slots(load, ids, layer)
            positions, of_positions = slots[key]
            keys, values = held.layers[layer.index]
            if len(positions) == 0:
                continue
            if len(positions) < len(keys):
                keys, values = keys[positions], values[positions]
            device = layer.cache.device
            layer.write(keys.to(device, non_blocking=True), values.to(device, non_blocking=True), of_positions)

    def _copy(self, save: Save) -> _Blocks:
        places: list[dict[int, int]] = []
        for ids in save.block_ids:
            kept = [place for place, block_id in enumerate(ids) if block_id != NULL_BLOCK]
            places.append({place: row for row, place in enumerate(kept)})
        layers = {}
        for layer in self._layers:
            ids = save.block_ids[layer.group]
            blocks = layer.cache[[ids[place] for place in places[layer.group]]].to("cpu", copy=True)
            layers[layer.index] = blocks.pin_memory() if self._pin_memory else blocks
        return _Blocks(layers, places)


def _slots(load: Load, ids: Sequence[int], layer: CacheLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions to write (on the host), and their slots (on the device)."""
    size = layer.block_size
    positions = [position for position in range(load.first, load.stop) if ids[position // size] != NULL_BLOCK]
    slots = [ids[position // size] * size + position % size for position in positions]
    return torch.tensor(positions, dtype=torch.long), torch.tensor(slots, dtype=torch.long, device=layer.cache.device)
