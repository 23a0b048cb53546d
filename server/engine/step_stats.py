"""Statistics of steps."""

from __future__ import annotations

from server.engine.scheduling.plan import StepPlan
from server.engine.stats import (
    BATCH_SIZE_BOUNDS,
    BATCH_TOKENS_BOUNDS,
    DISTINCT_PROMPTS_BOUNDS,
    STEP_SECONDS_BOUNDS,
)
from server.engine.types import EngineStats


def record_step(stats: EngineStats, plan: StepPlan, seconds: float) -> None:
    """Count a step that computed a plan, and took some seconds from scheduling to its last event."""
    stats.steps += 1
    stats.step_seconds.observe(STEP_SECONDS_BOUNDS, seconds)
    stats.batch_size.observe(BATCH_SIZE_BOUNDS, sum(chunk.seq is not None for chunk in plan.chunks))
    stats.batch_tokens.observe(BATCH_TOKENS_BOUNDS, plan.num_tokens)
    stats.batch_distinct_prompts.observe(DISTINCT_PROMPTS_BOUNDS, plan.num_distinct_prompts)
    stats.max_batch_distinct_prompts = max(stats.max_batch_distinct_prompts, plan.num_distinct_prompts)
