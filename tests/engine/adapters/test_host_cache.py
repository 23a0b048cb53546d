"""Adapters in host memory, beside a device with memory of its own."""

from __future__ import annotations

import pytest

from server.engine.adapters.host_cache import HostCache
from server.engine.adapters.weights import AdapterWeights
from server.engine.types import AdapterSource


def source(name: str) -> AdapterSource:
    return AdapterSource(digest=name, path=name, config_path=name, num_parameters=1)


class Files:
    """Files of some sizes, read and placed."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.read: list[str] = []
        self.placed: list[AdapterWeights] = []

    def pack(self, source: AdapterSource) -> AdapterWeights:
        self.read.append(source.digest)
        if source.digest not in self.sizes:
            raise OSError("no file")
        return AdapterWeights(frozenset(), self.sizes[source.digest])

    def place(self, weights: AdapterWeights) -> AdapterWeights:
        self.placed.append(weights)
        return AdapterWeights(frozenset(), weights.nbytes)


def test_files_are_read_once_and_the_least_recently_used_is_evicted() -> None:
    files = Files({"a": 40, "b": 40, "c": 30})
    cache = HostCache(files.pack, files.place, budget_bytes=100)
    for name in ("a", "b", "a", "c", "a", "b"):
        placed = cache.read(source(name))
        assert placed is not files.placed[-1]
        assert cache.stats.resident_bytes <= 100
    assert files.read == ["a", "b", "c", "b"]
    assert cache.digests == ["b", "a"], "the last used first"
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.evictions, stats.loads) == (2, 4, 2, 4)
    assert (stats.resident, stats.resident_bytes) == (2, 80)
    assert len(files.placed) == 6


def test_an_adapter_larger_than_the_memory_is_not_kept() -> None:
    files = Files({"a": 40, "large": 101})
    cache = HostCache(files.pack, files.place, budget_bytes=100)
    for name in ("a", "large", "large", "a"):
        cache.read(source(name))
    assert files.read == ["a", "large", "large"]
    assert cache.stats.evictions == 0


def test_a_file_that_cannot_be_read_raises() -> None:
    cache = HostCache(Files({}).pack, Files({}).place, budget_bytes=100)
    with pytest.raises(OSError, match="no file"):
        cache.read(source("a"))
    assert cache.stats.resident == 0
