"""All Prometheus metrics of the server. Base units; every label has a bounded number of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
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
)
from server.engine.types import EngineStats
from server.top_names import TopNames

PREFIX = "prelude_"

BASE_LABEL = "-"
"""The ``prompt`` label of requests to the base model; no soft prompt's name starts with a dash."""

OTHER_LABEL = "other"
"""The ``prompt`` label of all soft prompts except the N most used, and of one named ``other``."""

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PHASE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class StoreState:
    """The state of the store.

    Attributes:
        totals: Number of names and versions.
        tiers: Size and counters of each blob tier.
        is_catalog_available: Whether the catalog is reachable.
    """

    totals: StoreTotals = field(default_factory=StoreTotals)
    tiers: Sequence[TierStats] = ()
    is_catalog_available: bool = True


class Metrics:
    """The metrics of one application, in a separate registry.

    Args:
        read_stats: Returns the engine's newest state.
        read_store: Returns the state of the store; called at each scrape, outside the event loop.
        top_prompts: Number of soft prompts with a separate ``prompt`` label: the most used ones.
    """

    def __init__(
        self, *, read_stats: Callable[[], EngineStats], read_store: Callable[[], StoreState], top_prompts: int
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._labelled = TopNames(top_prompts)
        self._outcomes: dict[str, set[str]] = {}
        """The outcomes that have a time series, by label."""
        self._requests = Counter(
            f"{PREFIX}requests",
            "Finished requests, by soft prompt ('-': base model; 'other': all but the most used) and outcome: "
            "stop, length (a choice reached max_tokens), abort (client disconnected) or error.",
            ["prompt", "outcome"],
            registry=self._registry,
        )
        self._errors = Counter(
            f"{PREFIX}request_errors",
            "Error responses, by error code.",
            ["code"],
            registry=self._registry,
        )
        self._key_reloads = Counter(
            f"{PREFIX}api_key_reloads",
            "Reloads of the API key file, by outcome: success, or failure (the old keys remain).",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("success", "failure"):
            self._key_reloads.labels(outcome)
        self._first_token = PrometheusHistogram(
            f"{PREFIX}time_to_first_token_seconds",
            "Time from a request's arrival to its first new token.",
            registry=self._registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = PrometheusHistogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Time between consecutive new tokens of a sequence.",
            registry=self._registry,
            buckets=_INTER_TOKEN_BUCKETS,
        )
        self._request = PrometheusHistogram(
            f"{PREFIX}e2e_request_latency_seconds",
            "Time from a request's arrival to its last new token, for completed requests.",
            registry=self._registry,
            buckets=_REQUEST_BUCKETS,
        )
        self._queue_time = self._request_time("queue", "Time a sequence spent in the queue.")
        self._prefill_time = self._request_time("prefill", "Time from a sequence's start to its first new token.")
        self._decode_time = self._request_time("decode", "Time from a sequence's first new token to its last.")
        self._registry.register(_ScrapeCollector(read_stats, read_store))

    def count_request(self, prompt_name: str | None, outcome: str) -> None:
        """An admitted request has ended; ``prompt_name`` is None for the bare base."""
        label = self._prompt_label(prompt_name)
        self._outcomes.setdefault(label, set()).add(outcome)
        self._requests.labels(label, outcome).inc()

    def count_error(self, code: str) -> None:
        """Count an error response."""
        self._errors.labels(code).inc()

    def count_key_reload(self, outcome: str) -> None:
        """The API key file was read again: ``success`` or ``failure``."""
        self._key_reloads.labels(outcome).inc()

    def observe_first_token(self, seconds: float) -> None:
        """A request's first token came this long after its arrival."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """A sequence's next token came this long after the one before."""
        self._inter_token.observe(seconds)

    def observe_request(self, seconds: float) -> None:
        """A request ran to its end in this time."""
        self._request.observe(seconds)

    def observe_phases(self, queue_seconds: float, prefill_seconds: float) -> None:
        """A sequence has its first token, after it waited and then ran for so long."""
        self._queue_time.observe(queue_seconds)
        self._prefill_time.observe(prefill_seconds)

    def observe_decode(self, seconds: float) -> None:
        """A sequence's last token came this long after its first."""
        self._decode_time.observe(seconds)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where ``accept`` asks for it. Reads the store."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _request_time(self, phase: str, text: str) -> PrometheusHistogram:
        name = f"{PREFIX}request_{phase}_time_seconds"
        return PrometheusHistogram(name, text, registry=self._registry, buckets=_PHASE_BUCKETS)

    def _prompt_label(self, name: str | None) -> str:
        if name is None:
            return BASE_LABEL
        if name == OTHER_LABEL:
            return OTHER_LABEL
        replaced = self._labelled.use(name)
        if replaced is not None:
            # Remove its series. Adding them to ``other`` would show old requests as a jump in its rate.
            for outcome in self._outcomes.pop(replaced, ()):
                self._requests.remove(replaced, outcome)
        return name if self._labelled.holds(name) else OTHER_LABEL


class _ScrapeCollector(Collector):
    """Metrics whose values are read from the engine and the store at each scrape."""

    def __init__(self, read_stats: Callable[[], EngineStats], read_store: Callable[[], StoreState]) -> None:
        self._read_stats = read_stats
        self._read_store = read_store

    def collect(self) -> Iterator[Metric]:
        stats, store = self._read_stats(), self._read_store()
        yield _gauge("num_requests_running", "Running sequences.", stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences waiting for key/value blocks or a slot.", stats.num_waiting)
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
        yield _counter("num_preemptions", "Preemptions of running sequences.", stats.num_preemptions)
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
        yield _gauge("soft_prompts_registered", "Number of soft prompts in the store.", store.totals.num_prompts)
        yield _gauge("soft_prompt_versions", "Number of versions in the store.", store.totals.num_versions)
        yield _gauge(
            "catalog_available",
            "1 if the catalog is reachable; 0 if only cached names and versions are served.",
            float(store.is_catalog_available),
        )
        yield from _tiers(stats, store)

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
