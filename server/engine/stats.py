"""The engine's statistics, and the bounds of their histograms. Plain data."""

from __future__ import annotations

from functools import partial

import msgspec

from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram

STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_SIZE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH_TOKENS_BOUNDS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DISTINCT_PROMPTS_BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def _empty(bounds: tuple[float, ...]) -> Histogram:
    histogram: Histogram = msgspec.field(default_factory=partial(Histogram.empty, bounds))
    return histogram


class EngineTierStats(msgspec.Struct, kw_only=True):
    """Soft prompts or adapters in one kind of memory. Counters count from the engine's start.

    Attributes:
        resident: Those in memory, in use or not; each task of a multitask prompt counts.
        resident_bytes: Bytes of their tensors.
        hits: Uses that found one in memory, or being loaded into it.
        misses: Uses that started a load.
        evictions: Those evicted to stay within the budget.
        load_seconds: Durations of the loads, over ``LOAD_SECONDS_BOUNDS``.
    """

    resident: int = 0
    resident_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    load_seconds: Histogram = _empty(LOAD_SECONDS_BOUNDS)

    @property
    def loads(self) -> int:
        """Finished loads."""
        return self.load_seconds.count


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's state after a step. Counters count from the engine's start.

    Attributes:
        num_running: Sequences that hold blocks and take part in steps.
        num_waiting: Sequences that wait for blocks, for a slot, for their soft prompt's file or for their grammar.
        num_batch_waiting: Sequences of the service tier ``batch`` that wait; they are not in ``num_waiting``.
        num_blocks: Number of key/value blocks.
        block_size: Tokens per block.
        num_used_blocks: Blocks that a sequence references.
        num_cached_blocks: Blocks that hold only an idle, reusable prefix.
        num_preemptions: Preemptions of running sequences.
        num_timeouts: Sequences that ended because they had not run by their deadline.
        prefix_cache_queries: Prompt tokens looked up in the prefix cache.
        prefix_cache_hits: Prompt tokens found there.
        prompt_tokens: Prompt tokens of admitted sequences.
        generation_tokens: Generated tokens.
        virtual_tokens: Virtual tokens of admitted sequences.
        soft_prompts_resident: Soft prompts whose keys and values are on the device.
        soft_prompt_bytes: Bytes of their blocks.
        soft_prompt_loads: Soft prompts filled into blocks.
        soft_prompt_evictions: Soft prompts evicted from blocks.
        soft_prompt_hits: Sequences that found their soft prompt in blocks, or being filled into them.
        soft_prompt_misses: Sequences that had to allocate blocks for their soft prompt.
        host: Soft prompts in host memory.
        adapters: Adapters in host memory.
        device_adapters: Adapters in the memory of a GPU.
        adapter_wait_seconds: From the turn of a sequence with adapters until all of them were in memory, over
            ``STEP_SECONDS_BOUNDS``.
        steps: Forward passes.
        step_seconds: Wall time per pass, over ``STEP_SECONDS_BOUNDS``.
        batch_size: Sequences per pass, over ``BATCH_SIZE_BOUNDS``.
        batch_tokens: Tokens computed per pass, over ``BATCH_TOKENS_BOUNDS``.
        batch_distinct_prompts: Distinct soft prompts per pass, over ``DISTINCT_PROMPTS_BOUNDS``.
        max_batch_distinct_prompts: Maximum number of distinct soft prompts in one pass.
        batch_distinct_adapters: Distinct adapters per pass, over ``DISTINCT_PROMPTS_BOUNDS``.
        max_batch_distinct_adapters: Maximum number of distinct adapters in one pass.
        restarts: Restarts of the engine process. Counted in the API process.
        step_timeouts: Engine processes killed because a step hung. Counted in the API process.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_batch_waiting: int = 0
    num_blocks: int = 0
    block_size: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_preemptions: int = 0
    num_timeouts: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    virtual_tokens: int = 0
    soft_prompts_resident: int = 0
    soft_prompt_bytes: int = 0
    soft_prompt_loads: int = 0
    soft_prompt_evictions: int = 0
    soft_prompt_hits: int = 0
    soft_prompt_misses: int = 0
    host: EngineTierStats = msgspec.field(default_factory=EngineTierStats)
    adapters: EngineTierStats = msgspec.field(default_factory=EngineTierStats)
    device_adapters: EngineTierStats = msgspec.field(default_factory=EngineTierStats)
    adapter_wait_seconds: Histogram = _empty(STEP_SECONDS_BOUNDS)
    steps: int = 0
    step_seconds: Histogram = _empty(STEP_SECONDS_BOUNDS)
    batch_size: Histogram = _empty(BATCH_SIZE_BOUNDS)
    batch_tokens: Histogram = _empty(BATCH_TOKENS_BOUNDS)
    batch_distinct_prompts: Histogram = _empty(DISTINCT_PROMPTS_BOUNDS)
    max_batch_distinct_prompts: int = 0
    batch_distinct_adapters: Histogram = _empty(DISTINCT_PROMPTS_BOUNDS)
    max_batch_distinct_adapters: int = 0
    restarts: int = 0
    step_timeouts: int = 0
