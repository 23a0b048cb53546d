"""vLLM's statistics as ``EngineStats``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
)
from server.engine.types import EngineStats, ModelInfo
from server.engine.vllm.scheduler_side import ConnectorStats


class Statistics:
    """Collects the statistics of an engine's steps.

    Args:
        on_step: Called with the ids of the requests that were given blocks, after each step.

    Attributes:
        stats: The engine's state after the newest step. The counters of requests are the front's.
    """

    def __init__(self, on_step: Callable[[Sequence[str]], None]) -> None:
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
        stats.num_waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
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
        self._on_step(found.started)

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
