"""vLLM's statistics as ``EngineStats``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    EngineStats,
)
from server.engine.types import ModelInfo
from server.engine.vllm.scheduler_side import ConnectorStats


class _OwnOfVllm(CollectorRegistry):
    """The part of the process's metrics that is vLLM's, without the times of creation."""

    def collect(self) -> Iterator[Metric]:
        """VLLM's metrics."""
        for metric in REGISTRY.collect():
            if metric.name.startswith("vllm:"):
                metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
                yield metric


class Statistics:
    """Collects the statistics of an engine's steps.

    Args:
        on_step: Called after each step, with the ids of the requests that were given blocks and the number of those
            in vLLM's queue.

    Attributes:
        stats: The engine's state after the newest step. The front counts the requests, and those that wait.
    """

    def __init__(self, on_step: Callable[[Sequence[str], int], None]) -> None:
        self.stats = EngineStats()
        self._on_step = on_step

    def loaded(self, model: ModelInfo) -> None:
        """Take over the sizes of the cache."""
        self.stats.num_blocks, self.stats.block_size = model.num_blocks, model.block_size

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Take over vLLM's statistics of a step, either of which may be missing."""
        if iteration is not None:
            self.stats.num_preemptions += iteration.num_preempted_reqs
        if scheduler is None:
            return
        stats = self.stats
        stats.num_running = scheduler.num_running_reqs
        stats.num_used_blocks = round(scheduler.kv_cache_usage * stats.num_blocks)
        stats.prefix_cache_queries += scheduler.prefix_cache_stats.queries
        stats.prefix_cache_hits += scheduler.prefix_cache_stats.hits
        if scheduler.kv_connector_stats is None:
            return
        found = msgspec.convert(scheduler.kv_connector_stats, ConnectorStats)
        stats.host = found.host
        stats.soft_prompt_loads = stats.soft_prompt_misses = found.num_loads
        stats.soft_prompt_hits = found.num_hits
        for step in found.steps:
            stats.steps += 1
            stats.step_seconds.observe(STEP_SECONDS_BOUNDS, step.seconds)
            stats.batch_size.observe(BATCH_SIZE_BOUNDS, step.num_sequences)
            stats.batch_tokens.observe(BATCH_TOKENS_BOUNDS, step.num_tokens)
            stats.batch_distinct_prompts.observe(DISTINCT_PROMPTS_BOUNDS, step.num_distinct)
            stats.max_batch_distinct_prompts = max(stats.max_batch_distinct_prompts, step.num_distinct)
            stats.batch_distinct_adapters.observe(DISTINCT_PROMPTS_BOUNDS, step.num_adapters)
            stats.max_batch_distinct_adapters = max(stats.max_batch_distinct_adapters, step.num_adapters)
        self._on_step(found.started, scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs)

    @staticmethod
    def exposition() -> str:
        """VLLM's own metrics, which it collects in this process, in Prometheus' text format."""
        return generate_latest(_OwnOfVllm()).decode()

    def logger_factory(self) -> Callable[[Any, int], StatLoggerBase]:
        """What vLLM takes as one of its loggers."""
        statistics = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                """Created by vLLM."""

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                """After each step."""
                statistics.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                """Nothing to log."""

        return Logger
