"""Statistics of steps, and of the scheduler's state."""

from __future__ import annotations

from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    EngineStats,
)


def record_state(stats: EngineStats, scheduler: Scheduler, *, block_bytes: int) -> None:
    """Record what a scheduler and its block manager hold now.

    Args:
        stats: Changed in place.
        scheduler: The scheduler.
        block_bytes: Bytes of a block.
    """
    blocks = scheduler.block_manager
    stats.num_running = scheduler.num_running
    stats.num_batch_waiting = scheduler.batch.num_waiting(scheduler.running)
    stats.num_waiting = len(scheduler.waiting) - stats.num_batch_waiting
    stats.num_cached_blocks = blocks.num_cached
    stats.num_used_blocks = blocks.num_blocks - blocks.num_available
    stats.num_preemptions = scheduler.num_preemptions
    stats.prefix_cache_queries = blocks.stats.queries
    stats.prefix_cache_hits = blocks.stats.hits
    filled = [run for run in blocks.runs.values() if run.is_filled]
    stats.soft_prompts_resident = len(filled)
    stats.soft_prompt_bytes = sum(len(run.blocks) for run in filled) * block_bytes
    stats.soft_prompt_loads = blocks.stats.run_loads
    stats.soft_prompt_evictions = blocks.stats.run_evictions
    stats.soft_prompt_hits = blocks.stats.run_hits
    stats.soft_prompt_misses = blocks.stats.run_loads
    stats.adapter_wait_seconds = scheduler.adapters.wait_seconds


def record_step(stats: EngineStats, plan: StepPlan, seconds: float) -> None:
    """Count a step that computed a plan, and took some seconds from scheduling to its last event."""
    stats.steps += 1
    stats.step_seconds.observe(STEP_SECONDS_BOUNDS, seconds)
    stats.batch_size.observe(BATCH_SIZE_BOUNDS, sum(chunk.seq is not None for chunk in plan.chunks))
    stats.batch_tokens.observe(BATCH_TOKENS_BOUNDS, plan.num_tokens)
    stats.batch_distinct_prompts.observe(DISTINCT_PROMPTS_BOUNDS, plan.num_distinct_prompts)
    stats.max_batch_distinct_prompts = max(stats.max_batch_distinct_prompts, plan.num_distinct_prompts)
    stats.batch_distinct_adapters.observe(DISTINCT_PROMPTS_BOUNDS, plan.num_distinct_adapters)
    stats.max_batch_distinct_adapters = max(stats.max_batch_distinct_adapters, plan.num_distinct_adapters)
