"""Drives an engine step by step, and times its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.prefill_parts.first_token import EngineStepper
from scripts.gpu.device import synchronise
from scripts.gpu.models import Scale
from server.engine.llm_engine import LLMEngine
from server.engine.types import AdapterSource, SoftPromptSource

MAX_TOKENS = 4096


def text(scale: Scale, number: int, length: int) -> list[int]:
    """The tokens of a text; different for each number."""
    return [1 + (7919 * number + 31 * position) % (scale.shape.vocabulary - 1) for position in range(length)]


def step_seconds(step: Callable[[], object], scale: Scale, count: int) -> float:
    """Seconds of a step, from ``count`` steps without a pause between them."""
    synchronise(scale.device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronise(scale.device)
    return (time.perf_counter() - started) / count


@contextmanager
def running(
    engine: LLMEngine,
    scale: Scale,
    batch: int,
    sources: Sequence[SoftPromptSource] = (),
    context: int | None = None,
    adapters: Sequence[AdapterSource] = (),
) -> Iterator[EngineStepper]:
    """An engine with running sequences; they are aborted at the end.

    Args:
        engine: An engine without work.
        scale: The scale of the check.
        batch: Number of sequences.
        sources: The soft prompts that they use in turn.
        context: Positions of each sequence, virtual tokens included; None for the scale's.
        adapters: The adapters that they use in turn.
    """
    stepper = EngineStepper(engine, sources, adapters)
    waiting = set()
    for number in range(batch):
        num_virtual = sources[number % len(sources)].num_virtual_tokens if sources else 0
        length = max(1, (scale.context if context is None else context) - num_virtual)
        limit = min(MAX_TOKENS, scale.max_model_len - num_virtual - length)
        stepper.add(f"running{number}", text(scale, number, length), limit)
        waiting.add(f"running{number}")
    names = sorted(waiting)
    try:
        while waiting:
            waiting -= set(stepper.step())
        for _ in range(2):
            stepper.step()
        yield stepper
    finally:
        for name in names:
            stepper.abort(name)
        while engine.num_unfinished:
            engine.step()


def steps_until_token(stepper: EngineStepper, names: Sequence[str], scale: Scale) -> list[float]:
    """Seconds of each step until all these requests have a token."""
    missing, times = set(names), []
    while missing:
        synchronise(scale.device)
        started = time.perf_counter()
        missing -= set(stepper.step())
        synchronise(scale.device)
        times.append(time.perf_counter() - started)
    return times
