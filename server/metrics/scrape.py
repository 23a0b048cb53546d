"""Metrics that are read from the engine and the store at each scrape."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from prompt_store.blobs.blobs import TierStats
from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from prompt_store.types import StoreTotals
from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    EngineStats,
)

PREFIX = "prelude_"


@dataclass(frozen=True, slots=True)
class StoreState:
    """The state of the store.

    Attributes:
        totals: Number of names and versions.
        tiers: Size and counters of each blob tier.
        is_catalog_available: Whether the catalog is reachable.
        free_bytes: Free space of the disk with the store's local files.
    """

    totals: StoreTotals = field(default_factory=StoreTotals)
    tiers: Sequence[TierStats] = ()
    is_catalog_available: bool = True
    free_bytes: int = 0


class AdapterUse:
    """Counts the sequences in flight by adapter, for ``lora_requests_info`` of the Gateway API's endpoint picker.

    Args:
        max_num_seqs: Maximum number of sequences in one step, and so of adapters.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._waiting: Counts[str] = Counts()
        self._running: Counts[str] = Counts()

    def wait(self, names: Iterable[str]) -> None:
        """A sequence with these adapters waits."""
        self._waiting.update(names)

    def begin(self, names: Iterable[str]) -> None:
        """Such a sequence has its first token."""
        _remove(self._waiting, names)
        self._running.update(names)

    def end(self, names: Iterable[str], *, has_begun: bool) -> None:
        """Such a sequence has ended."""
        _remove(self._running if has_begun else self._waiting, names)

    def metric(self) -> Metric:
        """The gauge; its value is the time. From any thread: the names are copied at once."""
        return _gauge(
            "lora_requests_info",
            "Adapters of the running and the waiting sequences; the value is the time in Unix seconds.",
            time.time(),
            {
                "max_lora": str(self._max_num_seqs),
                "running_lora_adapters": ",".join(sorted(self._running)),
                "waiting_lora_adapters": ",".join(sorted(self._waiting)),
            },
        )


def _remove(counts: Counts[str], names: Iterable[str]) -> None:
    for name in names:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]


class ForeignCollector(Collector):
    """Metrics that another program has written in the text format."""

    def __init__(self, read_exposition: Callable[[], str]) -> None:
        self._read_exposition = read_exposition

    def collect(self) -> Iterator[Metric]:
        """Parse the text."""
        return iter(text_string_to_metric_families(self._read_exposition()))


class ScrapeCollector(Collector):
    """Metrics whose values are read from the engine and the store at each scrape."""

    def __init__(
        self,
        read_stats: Callable[[], EngineStats],
        read_store: Callable[[], StoreState],
        adapter_use: AdapterUse,
    ) -> None:
        self._adapter_use = adapter_use
        self._read_stats = read_stats
        self._read_store = read_store

    def collect(self) -> Iterator[Metric]:
        """Read all values."""
        stats, store = self._read_stats(), self._read_store()
        yield _gauge("num_requests_running", "Running sequences.", stats.num_running)
        yield _gauge(
            "num_requests_waiting",
            "Waiting sequences, without those of the service tier batch.",
            stats.num_waiting,
        )
        yield _gauge(
            "num_batch_tier_requests_waiting", "Waiting sequences of the service tier batch.", stats.num_batch_waiting
        )
        yield _gauge(
            "kv_cache_usage_ratio",
            "Share of key/value blocks in use by sequences, 0 to 1.",
            stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0,
        )
        yield _gauge(
            "kv_cache_idle_prefix_blocks",
            "Key/value blocks that hold only an idle, reusable prefix.",
            stats.num_cached_blocks,
        )
        yield _gauge("kv_cache_blocks", "Total number of key/value blocks.", stats.num_blocks)
        yield _gauge("kv_cache_block_size_tokens", "Number of tokens per key/value block.", stats.block_size)
        yield _counter(
            "num_preemptions",
            "Preemptions, without those of the service tier batch.",
            stats.num_preemptions,
        )
        yield _counter("request_timeouts", "Sequences that timed out in the queue.", stats.num_timeouts)
        yield _counter(
            "prefix_cache_queries", "Text tokens looked up in the prefix cache.", stats.prefix_cache_queries
        )
        yield _counter("prefix_cache_hits", "Text tokens found in the prefix cache.", stats.prefix_cache_hits)
        yield _counter("prompt_tokens", "Text tokens of admitted requests.", stats.prompt_tokens)
        yield _counter("generation_tokens", "Generated tokens.", stats.generation_tokens)
        yield _counter("virtual_tokens", "Virtual tokens of admitted sequences.", stats.virtual_tokens)
        yield _counter("engine_steps", "Forward passes.", stats.steps)
        yield _counter("engine_restarts", "Restarts of the engine process.", stats.restarts)
        yield _counter(
            "engine_step_timeouts",
            "Engine processes killed because a step hung.",
            stats.step_timeouts,
        )
        yield _histogram("step_seconds", "Wall-clock time of a step.", STEP_SECONDS_BOUNDS, stats.step_seconds)
        yield _histogram("batch_size", "Number of sequences in a step.", BATCH_SIZE_BOUNDS, stats.batch_size)
        yield _histogram(
            "batch_tokens", "Number of tokens computed in a step.", BATCH_TOKENS_BOUNDS, stats.batch_tokens
        )
        yield _histogram(
            "batch_distinct_prompts",
            "Number of distinct soft prompts in a step.",
            DISTINCT_PROMPTS_BOUNDS,
            stats.batch_distinct_prompts,
        )
        yield _gauge(
            "batch_distinct_prompts_max",
            "Maximum number of distinct soft prompts in one step since the engine started.",
            stats.max_batch_distinct_prompts,
        )
        yield _histogram(
            "batch_distinct_adapters",
            "Number of distinct adapters in a step.",
            DISTINCT_PROMPTS_BOUNDS,
            stats.batch_distinct_adapters,
        )
        yield _gauge(
            "batch_distinct_adapters_max",
            "Maximum number of distinct adapters in one step since the engine started.",
            stats.max_batch_distinct_adapters,
        )
        yield _histogram(
            "adapter_wait_seconds",
            "Time from the turn of a sequence with an adapter until the adapter was in memory.",
            STEP_SECONDS_BOUNDS,
            stats.adapter_wait_seconds,
        )
        yield _gauge(
            "adapters_registered", "Number of names with an adapter in the store.", store.totals.num_adapters
        )
        yield self._adapter_use.metric()
        yield _gauge("soft_prompts_registered", "Number of soft prompts in the store.", store.totals.num_prompts)
        yield _gauge("soft_prompt_versions", "Number of versions in the store.", store.totals.num_versions)
        yield _gauge(
            "store_disk_free_bytes", "Free space of the disk with the store's local files.", store.free_bytes
        )
        yield _gauge(
            "catalog_available",
            "1 if the catalog is reachable; 0 if only cached names and versions are served.",
            float(store.is_catalog_available),
        )
        yield from _tiers(stats, store)
        yield from _adapter_tiers(stats)

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering does not read the store."""
        return ()


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _counter(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _histogram(
    name: str, text: str, bounds: Sequence[float], *histograms: Histogram, tiers: Sequence[str] = ()
) -> Metric:
    """One histogram, or one for each tier."""
    family = HistogramMetricFamily(PREFIX + name, text, labels=["tier"] if tiers else [])
    for labels, histogram in zip([[tier] for tier in tiers] or [[]], histograms, strict=True):
        buckets = [
            (floatToGoString(bound), float(count))  # type: ignore[no-untyped-call]
            for bound, count in histogram.cumulative(bounds)
        ]
        family.add_metric(labels, buckets, histogram.sum)
    return family


def _adapter_tiers(stats: EngineStats) -> Iterator[Metric]:
    """Metrics of adapters per tier: device (a GPU's memory), host (memory)."""
    tiers = {"device": stats.device_adapters, "host": stats.adapters}
    for name, text in (
        ("resident", "Adapters stored in a tier."),
        ("resident_bytes", "Size of the adapters in a tier, in bytes."),
    ):
        gauge = GaugeMetricFamily(f"{PREFIX}adapter_{name}", text, labels=["tier"])
        for tier, state in tiers.items():
            gauge.add_metric([tier], getattr(state, name))
        yield gauge
    for name, text in (
        ("loads", "Adapters loaded into a tier."),
        ("evictions", "Adapters evicted from a tier."),
        ("hits", "Uses that found the adapter in a tier, or being loaded into it."),
        ("misses", "Uses that had to load the adapter."),
    ):
        counter = CounterMetricFamily(f"{PREFIX}adapter_{name}", text, labels=["tier"])
        for tier, state in tiers.items():
            counter.add_metric([tier], getattr(state, name))
        yield counter
    yield _histogram(
        "adapter_load_seconds",
        "Duration of one load of an adapter into a tier.",
        LOAD_SECONDS_BOUNDS,
        *(state.load_seconds for state in tiers.values()),
        tiers=list(tiers),
    )


def _tiers(stats: EngineStats, store: StoreState) -> Iterator[Metric]:
    """Metrics per tier: device (key/value blocks), host (memory), disk (local files), object_store."""
    numbers = GaugeMetricFamily(
        f"{PREFIX}soft_prompt_resident", "Soft prompts stored in a tier (disk: number of files).", labels=["tier"]
    )
    sizes = GaugeMetricFamily(
        f"{PREFIX}soft_prompt_resident_bytes", "Size of the soft prompts in a tier, in bytes.", labels=["tier"]
    )
    host = stats.host
    held = [
        ("device", stats.soft_prompts_resident, stats.soft_prompt_bytes),
        ("host", host.resident, host.resident_bytes),
    ]
    held += [(tier.tier, tier.resident or 0, tier.resident_bytes or 0) for tier in store.tiers]
    for name, number, size in held:
        numbers.add_metric([name], number)
        sizes.add_metric([name], size)
    yield numbers
    yield sizes
    engine = {
        "loads": (stats.soft_prompt_loads, host.loads),
        "evictions": (stats.soft_prompt_evictions, host.evictions),
        "hits": (stats.soft_prompt_hits, host.hits),
        "misses": (stats.soft_prompt_misses, host.misses),
    }
    for name, text in (
        ("loads", "Soft prompts loaded into a tier (device, host) or read from it (others)."),
        ("evictions", "Soft prompts evicted from a tier."),
        ("hits", "Lookups found in a tier."),
        ("misses", "Lookups not found in a tier."),
        ("corrupt", "Stored files that were damaged and quarantined."),
    ):
        counter = CounterMetricFamily(f"{PREFIX}soft_prompt_{name}", text, labels=["tier"])
        for label, value in zip(("device", "host"), engine.get(name, ()), strict=False):
            counter.add_metric([label], value)
        for tier in store.tiers:
            counter.add_metric([tier.tier], getattr(tier, name))
        yield counter
    yield _histogram(
        "soft_prompt_load_seconds",
        "Duration of one load into host memory, or from another tier.",
        LOAD_SECONDS_BOUNDS,
        host.load_seconds,
        *(tier.load_seconds for tier in store.tiers),
        tiers=["host", *(tier.tier for tier in store.tiers)],
    )
