"""All Prometheus metrics of the server. Base units; every label has a bounded number of values."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.exposition import choose_encoder

from server.engine.stats import EngineStats
from server.metrics.labels import OTHER_LABEL, Series, TenantLabels, VersionLabels
from server.metrics.scrape import PREFIX, AdapterUse, ForeignCollector, ScrapeCollector, StoreState

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_VERSION_BUCKETS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
"""Few, because every version has them."""

_DIFFERENCE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_PHASE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)


class Latencies:
    """The histograms of one service tier.

    Args:
        registry: Where they are registered.
        tier: Part of their names; empty for the interactive tier.
        of: The end of their descriptions.
    """

    def __init__(self, registry: CollectorRegistry, *, tier: str = "", of: str = "") -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> PrometheusHistogram:
            return PrometheusHistogram(
                f"{PREFIX}{tier}{name}_seconds", f"{text}{of}.", registry=registry, buckets=buckets
            )

        self._first_token = histogram(
            "time_to_first_token", "Time from a request's arrival to its first new token", _FIRST_TOKEN_BUCKETS
        )
        self._inter_token = histogram(
            "inter_token_latency", "Time between consecutive new tokens of a sequence", _INTER_TOKEN_BUCKETS
        )
        self._request = histogram(
            "e2e_request_latency",
            "Time from a request's arrival to its last new token, for completed requests",
            _REQUEST_BUCKETS,
        )
        self._queue_time = histogram("request_queue_time", "Time a sequence spent in the queue", _PHASE_BUCKETS)
        self._prefill_time = histogram(
            "request_prefill_time", "Time from a sequence's start to its first new token", _PHASE_BUCKETS
        )
        self._decode_time = histogram(
            "request_decode_time", "Time from a sequence's first new token to its last", _PHASE_BUCKETS
        )

    def observe_first_token(self, seconds: float) -> None:
        """Observe the time from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """Observe the time between two tokens of a sequence."""
        self._inter_token.observe(seconds)

    def observe_request(self, seconds: float) -> None:
        """Observe the duration of a completed request."""
        self._request.observe(seconds)

    def observe_phases(self, queue_seconds: float, prefill_seconds: float) -> None:
        """Observe the queue and prefill times of a sequence, at its first token."""
        self._queue_time.observe(queue_seconds)
        self._prefill_time.observe(prefill_seconds)

    def observe_decode(self, seconds: float) -> None:
        """Observe the time from a sequence's first token to its last."""
        self._decode_time.observe(seconds)


class Metrics:
    """The metrics of one application, in a separate registry.

    Args:
        read_stats: Returns the engine's newest state.
        read_store: Returns the state of the store; called at each scrape, outside the event loop.
        read_exposition: Returns further metrics of the engine in Prometheus' text format, or nothing.
        top_prompts: Number of soft prompts with a separate ``prompt`` label: the most used ones.
        max_num_seqs: Maximum number of sequences in one step.

    Attributes:
        adapter_use: The adapters of the requests in flight.
    """

    def __init__(
        self,
        *,
        read_stats: Callable[[], EngineStats],
        read_store: Callable[[], StoreState],
        top_prompts: int,
        read_exposition: Callable[[], str] = str,
        max_num_seqs: int = 0,
    ) -> None:
        self.adapter_use = AdapterUse(max_num_seqs)
        self._registry = CollectorRegistry(auto_describe=False)
        self._series = Series()
        self._tenant_series = Series()
        self._versions = VersionLabels(top_prompts, self._series)
        self._tenants = TenantLabels(top_prompts, self._tenant_series)
        self._requests = Counter(
            f"{PREFIX}requests",
            "Finished requests by soft prompt or adapter (A+B: both; '-': none; 'other': all but the most used), "
            "version and outcome: stop, length (max_tokens), abort (client disconnected) or error.",
            ["prompt", "version", "outcome"],
            registry=self._registry,
        )
        self._version_first_token = PrometheusHistogram(
            f"{PREFIX}prompt_time_to_first_token_seconds",
            "Time from a request's arrival to its first new token, by soft prompt or adapter, and version.",
            ["prompt", "version"],
            registry=self._registry,
            buckets=_VERSION_BUCKETS,
        )
        self._version_latency = PrometheusHistogram(
            f"{PREFIX}prompt_e2e_request_latency_seconds",
            "Time from a request's arrival to its last new token, by soft prompt or adapter, and version.",
            ["prompt", "version"],
            registry=self._registry,
            buckets=_VERSION_BUCKETS,
        )
        self._shadows = Counter(
            f"{PREFIX}shadow_requests",
            "Copies of requests to a shadow version, by its name and version, and result: equal or different "
            "(from the answer that was returned), error, or dropped (the server was busy).",
            ["prompt", "version", "result"],
            registry=self._registry,
        )
        self._shadow_difference = PrometheusHistogram(
            f"{PREFIX}shadow_logprob_difference_nats",
            "Absolute difference of the mean log-probability per token of a shadow's answer and the returned one.",
            ["prompt", "version"],
            registry=self._registry,
            buckets=_DIFFERENCE_BUCKETS,
        )
        self._tenant_requests = Counter(
            f"{PREFIX}tenant_requests",
            "Finished requests, by tenant ('-': none; 'other': all but the most active) and outcome.",
            ["tenant", "outcome"],
            registry=self._registry,
        )
        self._tenant_tokens = Counter(
            f"{PREFIX}tenant_tokens",
            "Tokens of finished requests, by tenant and kind: prompt or completion.",
            ["tenant", "kind"],
            registry=self._registry,
        )
        self._http = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests, by method, route ('other': none of ours) and status ('-': the client disconnected).",
            ["method", "route", "status"],
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
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
        self._limit_exchanges = Counter(
            f"{PREFIX}key_limit_exchanges",
            "Exchanges of the use of keys' limits among the servers of a shared catalog, by outcome: success, or "
            "failure (the limits hold for this server alone until one succeeds).",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("success", "failure"):
            self._limit_exchanges.labels(outcome)
        self._latencies = Latencies(self._registry)
        self._batch_latencies = Latencies(self._registry, tier="batch_tier_", of=", in the service tier batch")
        build = Gauge(
            f"{PREFIX}build_info",
            "1, with the version of the server and of Python as labels.",
            ["version", "python"],
            registry=self._registry,
        )
        build.labels(metadata.version("prelude-server"), platform.python_version()).set(1)
        self._registry.register(ScrapeCollector(read_stats, read_store, self.adapter_use))
        self._registry.register(ForeignCollector(read_exposition))

    def count_request(
        self,
        prompt_name: str | None,
        outcome: str,
        *,
        version: str | None = None,
        first_token_seconds: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Count an admitted request that has ended, and observe its times.

        Args:
            prompt_name: What has answered it; None for the base model.
            outcome: How it ended.
            version: The version of what has answered it; None for the base model.
            first_token_seconds: Time from its arrival to its first token; None if there was none.
            seconds: Time to its last token; None if it was not completed.
        """
        labels = self._versions.use(prompt_name, version)
        self._series.child(self._requests, labels, outcome).inc()
        if first_token_seconds is not None:
            self._series.child(self._version_first_token, labels).observe(first_token_seconds)
        if seconds is not None:
            self._series.child(self._version_latency, labels).observe(seconds)

    def count_tenant(self, tenant: str, outcome: str, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the same request, and its tokens, for its tenant."""
        labels = self._tenants.use(tenant)
        self._tenant_series.child(self._tenant_requests, labels, outcome).inc()
        self._tenant_series.child(self._tenant_tokens, labels, "prompt").inc(prompt_tokens)
        self._tenant_series.child(self._tenant_tokens, labels, "completion").inc(completion_tokens)

    def count_shadow(self, prompt_name: str, version: str, result: str, difference: float | None = None) -> None:
        """Count a copy of a request to a shadow.

        Args:
            prompt_name: The shadow's name.
            version: Its version.
            result: ``equal``, ``different``, ``error`` or ``dropped``.
            difference: Mean log-probability per token of its answer minus that of the returned one.
        """
        labels = self._versions.use(prompt_name, version)
        self._series.child(self._shadows, labels, result).inc()
        if difference is not None:
            self._series.child(self._shadow_difference, labels).observe(abs(difference))

    def count_http(self, method: str, route: str | None, status: int | None) -> None:
        """Count an HTTP request; ``route`` is None for an unknown path, ``status`` if the client disconnected."""
        known = method if method in _METHODS else OTHER_LABEL
        self._http.labels(known, route or OTHER_LABEL, "-" if status is None else str(status)).inc()

    def count_error(self, code: str) -> None:
        """Count an error response."""
        self._errors.labels(code).inc()

    def count_key_reload(self, outcome: str) -> None:
        """Count a reload of the API key file: ``success`` or ``failure``."""
        self._key_reloads.labels(outcome).inc()

    def count_limit_exchange(self, outcome: str) -> None:
        """Count an exchange of the use of keys' limits: ``success`` or ``failure``."""
        self._limit_exchanges.labels(outcome).inc()

    def of_tier(self, *, is_batch: bool) -> Latencies:
        """The histograms of a service tier."""
        return self._batch_latencies if is_batch else self._latencies

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if ``accept`` requests it. Reads the store."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
