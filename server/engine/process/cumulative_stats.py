"""Statistics that keep counting when the engine process is restarted."""

from __future__ import annotations

from typing import Any

import msgspec

from server.engine.stats import EngineStats, EngineTierStats

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
    "batch_distinct_adapters",
    "adapter_wait_seconds",
)
MAXIMA = ("max_batch_distinct_prompts", "max_batch_distinct_adapters")
TIERS = ("host", "adapters", "device_adapters")
TIER_COUNTERS = ("hits", "misses", "evictions", "load_seconds")


def counters_of(stats: EngineStats) -> EngineStats:
    """The counters of an engine that has ended; everything else is empty."""
    kept: dict[str, Any] = {name: getattr(stats, name) for name in (*MAXIMA, *COUNTERS)}
    for tier in TIERS:
        counters = {name: getattr(getattr(stats, tier), name) for name in TIER_COUNTERS}
        kept[tier] = EngineTierStats(**counters)
    return EngineStats(**kept)


def add_counters(stats: EngineStats, ended: EngineStats) -> EngineStats:
    """The state of an engine, with the counters of the engines before it added."""
    tiers = {tier: _add_tier(getattr(stats, tier), getattr(ended, tier)) for tier in TIERS}
    return msgspec.structs.replace(
        stats,
        **tiers,
        **{name: max(getattr(stats, name), getattr(ended, name)) for name in MAXIMA},
        **{name: getattr(stats, name) + getattr(ended, name) for name in COUNTERS},
    )


def _add_tier(tier: EngineTierStats, ended: EngineTierStats) -> EngineTierStats:
    return msgspec.structs.replace(
        tier, **{name: getattr(tier, name) + getattr(ended, name) for name in TIER_COUNTERS}
    )
