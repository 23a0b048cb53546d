"""The worker's half of the connector: copies between files, host memory and blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from server.engine.types import SoftPromptSource
from server.engine.vllm.residency import Read, Reported
from server.engine.vllm.scheduler_side import Commands, Load, Save
from server.engine.vllm.worker_side import CacheLayer, Shard, WorkerSide, by_blocks, shard_of
from tests.support.waiting import wait_until

LAYERS, HEADS, DIM, COUNT = 3, 2, 4, 6
SOURCE = SoftPromptSource(digest="a", num_virtual_tokens=COUNT, is_key_values=True, path="/a")


def peft_rows() -> torch.Tensor:
    return torch.randn(COUNT, LAYERS * 2 * HEADS * DIM)


def layers_of(num_heads: int = HEADS) -> list[CacheLayer]:
    """Layers 0 and 2 in blocks of 4, layer 1 in blocks of 8, each of [blocks, heads, positions, keys and values]."""
    layers = []
    for index in range(LAYERS):
        size = 8 if index == 1 else 4
        cache = torch.zeros(10, num_heads, size, 2 * DIM)
        layers.append(CacheLayer(index, int(index == 1), size, cache, _writer(cache, size)))
    return layers


def _writer(cache: torch.Tensor, size: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        cache[slots // size, :, slots % size] = torch.cat([keys, values], -1)

    return write


@dataclass
class Worker:
    """A worker side whose files come from a dictionary."""

    files: dict[str, torch.Tensor] = field(default_factory=lambda: {"/a": peft_rows()})
    shard: Shard = field(default_factory=lambda: Shard(LAYERS, HEADS, DIM, 0, HEADS))
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.side = WorkerSide(self.shard, self.read)
        self.layers = layers_of(self.shard.num_own_heads)
        self.side.register(self.layers)

    def read(self, source: SoftPromptSource) -> torch.Tensor:
        assert self.gate.wait(10)
        if source.path not in self.files:
            raise OSError(f"no {source.path}")
        return self.files[source.path]

    def report(self) -> Reported:
        """The next report with something in it."""
        found: list[Reported] = []

        def look() -> bool:
            reported = self.side.take_report()
            found.extend([] if reported is None else [reported])
            return bool(found)

        wait_until(look)
        return found[0]


@pytest.fixture
def worker() -> Worker:
    torch.manual_seed(0)
    return Worker()


def test_a_prefix_is_read_beside_the_steps_and_written_into_blocks(worker: Worker) -> None:
    worker.gate.clear()
    worker.side.before_step(Commands(reads=[Read(1, SOURCE)]))
    assert worker.side.take_report() is None
    worker.gate.set()
    rows = worker.files["/a"]
    assert worker.report().loaded[1][:2] == (1, rows.nbytes)
    worker.side.before_step(Commands(loads=[Load(1, 0, COUNT, ((3, 5), (7,)))]))
    expected = rows.view(COUNT, LAYERS, 2, HEADS, DIM)
    for layer in worker.layers:
        ids = (7,) if layer.group else (3, 5)
        for position in range(COUNT):
            got = layer.cache[ids[position // layer.block_size], :, position % layer.block_size]
            assert torch.equal(got[:, :DIM], expected[position, layer.index, 0])
            assert torch.equal(got[:, DIM:], expected[position, layer.index, 1])
        assert layer.cache.count_nonzero() == expected[:, layer.index].numel()


def test_positions_in_the_prefix_cache_or_out_of_the_window_are_not_written(worker: Worker) -> None:
    worker.side.before_step(Commands(reads=[Read(1, SOURCE)]))
    worker.report()
    worker.side.before_step(Commands(loads=[Load(1, 4, COUNT, ((3, 5), (0,)))]))
    cached, windowed, _ = worker.layers
    assert not cached.cache[3].any()
    assert cached.cache[5, :, :2].all()
    assert not windowed.cache.any()


@pytest.mark.parametrize(("world", "num_own"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_each_rank_holds_its_own_heads(world: int, num_own: int) -> None:
    rows = torch.randn(COUNT, LAYERS * 2 * 4 * DIM)
    whole = rows.view(COUNT, LAYERS, 2, 4, DIM)
    seen: list[int] = []
    for rank in range(world):
        shard = shard_of(rank, world, num_layers=LAYERS, num_heads=4, head_dim=DIM)
        assert shard.num_own_heads == num_own
        keys, values = shard.cut(rows, 2)
        own = slice(shard.first_head, shard.first_head + num_own)
        assert torch.equal(keys, whole[:, 2, 0, own])
        assert torch.equal(values, whole[:, 2, 1, own])
        seen += range(shard.first_head, shard.first_head + num_own)
    assert sorted(seen) == sorted(list(range(4)) * max(1, world // 4))


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 2, 1, 0)]
"""Dimensions of a cache in the order in which they lie in memory."""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ratio", [1, 2])
def test_computed_blocks_are_kept_as_they_lie(worker: Worker, order: tuple[int, ...], ratio: int) -> None:
    layers = []
    for layer in worker.layers:
        shape = [10 * ratio, HEADS, layer.block_size // ratio, 2 * DIM]
        inverse = [order.index(dimension) for dimension in range(4)]
        cache = by_blocks(torch.zeros([shape[dimension] for dimension in order]).permute(inverse), 10)
        layers.append(replace(layer, cache=cache))
    worker.layers = layers
    worker.side.register(layers)
    for layer in worker.layers:
        layer.cache.normal_()
    before = [layer.cache.clone() for layer in worker.layers]
    worker.side.after_step(Commands(saves=[Save(1, ((0, 4), (2,)))]))
    assert worker.report().loaded[1][0] == 1
    worker.layers[0].cache[4] = 0
    # The first block of the one group has left the window, for the load as for the save.
    worker.side.before_step(Commands(loads=[Load(1, 0, COUNT, ((0, 9), (8,)))]))
    for layer, old in zip(worker.layers, before, strict=True):
        source, target = (2, 8) if layer.group else (4, 9)
        assert torch.equal(layer.cache[target], old[source])
    assert torch.equal(worker.layers[2].cache[0], before[2][0])


def test_dropped_soft_prompts_are_freed_also_while_they_are_read(worker: Worker) -> None:
    worker.side.before_step(Commands(reads=[Read(1, SOURCE)]))
    worker.report()
    worker.gate.clear()
    worker.side.before_step(Commands(drops=[1], reads=[Read(2, SOURCE), Read(3, SOURCE)]))
    assert worker.side.num_held == 0
    worker.side.before_step(Commands(drops=[2]))
    worker.gate.set()
    assert worker.report().loaded.keys() == {3}
    assert worker.side.num_held == 1
    worker.side.before_step(Commands(drops=[4]))  # unknown


@pytest.mark.parametrize("rows", [None, torch.zeros(COUNT, 7)])
def test_a_file_that_cannot_be_used_is_reported(worker: Worker, rows: torch.Tensor | None) -> None:
    if rows is None:
        worker.files.clear()
    else:
        worker.files["/a"] = rows
    worker.side.before_step(Commands(reads=[Read(1, SOURCE)]))
    reported = worker.report()
    assert reported.loaded == {}
    assert reported.failed[1]
    assert worker.side.take_report() is None


def test_a_copy_that_fails_is_reported(worker: Worker) -> None:
    worker.side.after_step(Commands(saves=[Save(1, ((99,), (1,)))]))
    assert "IndexError" in worker.report().failed[1]
    assert worker.side.num_held == 0


def test_failed_requests_are_reported_once(worker: Worker) -> None:
    worker.side.before_step(Commands(failed=["r"]))
    assert worker.side.take_failed() == {"r"}
    assert worker.side.take_failed() == set()


def test_nothing_is_read_after_the_end(worker: Worker) -> None:
    worker.gate.clear()
    worker.side.before_step(Commands(reads=[Read(1, SOURCE), Read(2, SOURCE)]))
    worker.side.close()
    worker.gate.set()
    assert worker.report().loaded.keys() == {1}


@pytest.mark.parametrize("num_blocks", [0, 3, 20])
def test_blocks_that_a_kernel_cannot_divide_are_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        by_blocks(torch.zeros(10, 2), num_blocks)
