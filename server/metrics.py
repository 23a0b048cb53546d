"""Every Prometheus name of the server, in one place. Base units; labels of bounded number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from prompt_store.blobs.blobs import TierStats
from prompt_store.types import StoreTotals
from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    Distribution,
)
from server.engine.types import EngineStats
from server.top_names import TopNames

PREFIX = "prelude_"

BASE_LABEL = "-"
"""The ``prompt`` label of requests to the bare base; no soft prompt's name can start with a dash."""

OTHER_LABEL = "other"
"""The ``prompt`` label that all soft prompts share but the N most used now, and one that is named so itself."""

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PHASE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class StoreState:
    """What the store holds and how it is.

    Attributes:
        totals: How much there is.
        tiers: What each tier of its blobs holds and has done.
        is_catalog_available: Whether names and versions can be looked up and changed now.
    """

    totals: StoreTotals = field(default_factory=StoreTotals)
    tiers: Sequence[TierStats] = ()
    is_catalog_available: bool = True


class Metrics:
    """The measurements of one application, in a registry of its own.

    Args:
        read_stats: The engine's newest state.
        read_store: How the store is; called at each scrape, outside the event loop.
        top_prompts: Soft prompts that get a ``prompt`` label of their own: those that are used the most now.
    """

    def __init__(
        self, *, read_stats: Callable[[], EngineStats], read_store: Callable[[], StoreState], top_prompts: int
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._labelled = TopNames(top_prompts)
        self._outcomes: dict[str, set[str]] = {}
        """By label: the outcomes that there are series of."""
        self._requests = Counter(
            f"{PREFIX}requests",
            "Admitted requests that have ended, by soft prompt ('-' is the bare base, the most used now have their "
            "own, 'other' are the rest) and outcome: "
            "stop, length (some choice was cut off), abort (the client went away) or error.",
            ["prompt", "outcome"],
            registry=self._registry,
        )
        self._errors = Counter(
            f"{PREFIX}request_errors",
            "Error replies, by the code that the client got.",
            ["code"],
            registry=self._registry,
        )
        self._key_reloads = Counter(
            f"{PREFIX}api_key_reloads",
            "Times that the API key file was read again, by outcome: success, or failure (the old keys stay).",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("success", "failure"):
            self._key_reloads.labels(outcome)
        self._first_token = Histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "From a request's arrival to its first new token.",
            registry=self._registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = Histogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Between one new token of a sequence and the next.",
            registry=self._registry,
            buckets=_INTER_TOKEN_BUCKETS,
        )
        self._request = Histogram(
            f"{PREFIX}e2e_request_latency_seconds",
            "From a request's arrival to its last new token, for requests that ran to their end.",
            registry=self._registry,
            buckets=_REQUEST_BUCKETS,
        )
        self._queue_time = self._request_time("queue", "From a sequence's arrival at the engine to its first blocks.")
        self._prefill_time = self._request_time("prefill", "From a sequence's first blocks to its first new token.")
        self._decode_time = self._request_time("decode", "From a sequence's first new token to its last.")
        self._registry.register(_ScrapeCollector(read_stats, read_store))

    def count_request(self, prompt_name: str | None, outcome: str) -> None:
        """An admitted request has ended; ``prompt_name`` is None for the bare base."""
        label = self._prompt_label(prompt_name)
        self._outcomes.setdefault(label, set()).add(outcome)
        self._requests.labels(label, outcome).inc()

    def count_error(self, code: str) -> None:
        """A client was answered with an error."""
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

    def _request_time(self, phase: str, text: str) -> Histogram:
        name = f"{PREFIX}request_{phase}_time_seconds"
        return Histogram(name, text, registry=self._registry, buckets=_PHASE_BUCKETS)

    def _prompt_label(self, name: str | None) -> str:
        if name is None:
            return BASE_LABEL
        if name == OTHER_LABEL:
            return OTHER_LABEL
        replaced = self._labelled.use(name)
        if replaced is not None:
            # Its series end, as those of a process that has ended. Were they added to ``other``, the rate of that
            # would show requests of long ago once more.
            for outcome in self._outcomes.pop(replaced, ()):
                self._requests.remove(replaced, outcome)
        return name if self._labelled.holds(name) else OTHER_LABEL


class _ScrapeCollector(Collector):
    """Metrics whose values others keep: read when they are asked for."""

    def __init__(self, read_stats: Callable[[], EngineStats], read_store: Callable[[], StoreState]) -> None:
        self._read_stats = read_stats
        self._read_store = read_store

    def collect(self) -> Iterator[Metric]:
        stats, store = self._read_stats(), self._read_store()
        yield _gauge("num_requests_running", "Sequences that take part in steps.", stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences that wait for blocks or a place.", stats.num_waiting)
        yield _gauge(
            "kv_cache_usage_ratio",
            "Share of the key/value blocks that sequences refer to, 0 to 1.",
            stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0,
        )
        yield _gauge(
            "kv_cache_idle_prefix_blocks", "Blocks that hold only an idle, reusable prefix.", stats.num_cached_blocks
        )
        yield _gauge("kv_cache_blocks", "Key/value blocks in all.", stats.num_blocks)
        yield _gauge("kv_cache_block_size_tokens", "Tokens that a key/value block holds.", stats.block_size)
        yield _counter("num_preemptions", "Sequences whose blocks were taken back.", stats.num_preemptions)
        yield _counter(
            "request_timeouts", "Sequences that did not begin to run within their timeout.", stats.num_timeouts
        )
        yield _counter(
            "prefix_cache_queries", "Text tokens looked up in the prefix cache.", stats.prefix_cache_queries
        )
        yield _counter("prefix_cache_hits", "Text tokens found in the prefix cache.", stats.prefix_cache_hits)
        yield _counter("prompt_tokens", "Text tokens of admitted prompts.", stats.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield _counter("virtual_tokens", "Virtual tokens of admitted sequences.", stats.virtual_tokens)
        yield _counter("engine_steps", "Forward passes.", stats.steps)
        yield _counter("engine_restarts", "Times that the engine's process was replaced.", stats.restarts)
        yield _counter(
            "engine_step_timeouts",
            "Times that the engine's process was killed for a step that did not end.",
            stats.step_timeouts,
        )
        yield _histogram("step_seconds", "Wall times of steps.", STEP_SECONDS_BOUNDS, stats.step_seconds)
        yield _histogram("batch_size", "Sequences in a step.", BATCH_SIZE_BOUNDS, stats.batch_size)
        yield _histogram("batch_tokens", "Tokens computed in a step.", BATCH_TOKENS_BOUNDS, stats.batch_tokens)
        yield _histogram(
            "batch_distinct_prompts",
            "Distinct soft prompts in a step.",
            DISTINCT_PROMPTS_BOUNDS,
            stats.batch_distinct_prompts,
        )
        yield _gauge(
            "batch_distinct_prompts_max",
            "The most distinct soft prompts that any one step has mixed since the engine started.",
            stats.max_batch_distinct_prompts,
        )
        yield _gauge("soft_prompts_registered", "Names in the store.", store.totals.num_prompts)
        yield _gauge("soft_prompt_versions", "Versions in the store, of all names.", store.totals.num_versions)
        yield _gauge(
            "catalog_available",
            "1 while names and versions can be looked up and changed; while 0, what is known already is served.",
            float(store.is_catalog_available),
        )
        yield from _tiers(stats, store)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not read the store."""
        return ()


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _counter(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _histogram(name: str, text: str, bounds: Iterable[float], distribution: Distribution) -> Metric:
    cumulative = zip((*bounds, inf), accumulate(distribution.counts), strict=True)
    return HistogramMetricFamily(PREFIX + name, text, buckets=_buckets(cumulative), sum_value=distribution.sum)


def _tiers(stats: EngineStats, store: StoreState) -> Iterator[Metric]:
    """Where soft prompts are: device (key/value blocks), host (memory), disk (local files), object_store."""
    numbers = GaugeMetricFamily(
        f"{PREFIX}soft_prompt_resident", "Soft prompts held in a tier (on disk: files).", labels=["tier"]
    )
    sizes = GaugeMetricFamily(f"{PREFIX}soft_prompt_resident_bytes", "Their size in bytes.", labels=["tier"])
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
        ("loads", "Times one was brought into (device, host) or read from a tier."),
        ("evictions", "Times one was dropped from a tier for room."),
        ("hits", "Uses that a tier could answer."),
        ("misses", "Uses that a tier could not answer."),
        ("corrupt", "Stored files that were not what was uploaded, and were put aside."),
    ):
        counter = CounterMetricFamily(f"{PREFIX}soft_prompt_{name}", text, labels=["tier"])
        for label, value in zip(("device", "host"), engine.get(name, ()), strict=False):
            counter.add_metric([label], value)
        for tier in store.tiers:
            counter.add_metric([tier.tier], getattr(tier, name))
        yield counter
    seconds = HistogramMetricFamily(
        f"{PREFIX}soft_prompt_load_seconds",
        "How long one load into host, or from another tier, took.",
        labels=["tier"],
    )
    if host.load_seconds_buckets:  # else the engine has not begun
        seconds.add_metric(["host"], _buckets(host.load_seconds_buckets), host.load_seconds_sum)
    for tier in store.tiers:
        seconds.add_metric([tier.tier], _buckets(tier.load_seconds_buckets), tier.load_seconds_sum)
    yield seconds


def _buckets(counts: Iterable[tuple[float, int]]) -> list[tuple[str, float]]:
    """Cumulative counts as Prometheus writes them."""
    return [
        (floatToGoString(bound), float(count))  # type: ignore[no-untyped-call]
        for bound, count in counts
    ]
