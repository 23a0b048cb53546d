"""Counters that go on counting over the lives of several engine processes."""

from __future__ import annotations

import msgspec

from server.engine.types import EngineStats, HostTierStats

COUNTERS = (
    "num_preemptions",
    "num_timeouts",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "virtual_tokens",
    "soft_prompt_loads",
    "soft_prompt_evictions",
    "soft_prompt_hits",
    "soft_prompt_misses",
    "steps",
    "restarts",
    "step_timeouts",
    "step_seconds",
    "batch_size",
    "batch_tokens",
    "batch_distinct_prompts",
)
HOST_COUNTERS = ("hits", "misses", "evictions", "load_seconds")


def totals_of(stats: EngineStats) -> EngineStats:
    """What is left of an engine that has ended: its counters, and nothing that it held."""
    host = HostTierStats(**{name: getattr(stats.host, name) for name in HOST_COUNTERS})
    return EngineStats(
        host=host,
        max_batch_distinct_prompts=stats.max_batch_distinct_prompts,
        **{name: getattr(stats, name) for name in COUNTERS},
    )


def with_totals(stats: EngineStats, ended: EngineStats) -> EngineStats:
    """The state of an engine, its counters raised by those of the engines that served before it."""
    host = msgspec.structs.replace(
        stats.host,
        **{name: getattr(stats.host, name) + getattr(ended.host, name) for name in HOST_COUNTERS},
    )
    return msgspec.structs.replace(
        stats,
        host=host,
        max_batch_distinct_prompts=max(stats.max_batch_distinct_prompts, ended.max_batch_distinct_prompts),
        **{name: getattr(stats, name) + getattr(ended, name) for name in COUNTERS},
    )
