"""A long soft prompt that many sequences share, and soft prompts that are loaded while others run."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from benchmarks.prefill_parts.first_token import EngineStepper
from scripts.gpu.driving import running, step_seconds, steps_until_token, text
from scripts.gpu.models import Scale, draw_soft_prompts, serving
from scripts.gpu.results import Results
from server.engine.llm_engine import LLMEngine

SHORT_TEXT = 16
SHORT_PROMPT = 20
MOST_OVER_MEDIAN = 2.0
LOADS = 3


def run(results: Results, scale: Scale) -> None:
    """Measure both."""
    with tempfile.TemporaryDirectory() as folder, serving(scale) as engine:
        for length in (SHORT_PROMPT, scale.cartridge):
            add_loads(results, scale, engine, Path(folder), length)
        add_shared(results, scale, engine, Path(folder))


def add_shared(results: Results, scale: Scale, engine: LLMEngine, folder: Path) -> None:
    """Steps of sequences that share one Cartridge, which is on the device once."""
    (source,) = draw_soft_prompts(scale, folder, 1, scale.cartridge, only_key_values=True)
    before = engine.stats.soft_prompts_resident
    context = scale.cartridge + SHORT_TEXT
    with running(engine, scale, scale.batch, [source], context) as stepper:
        spent = step_seconds(stepper.step, scale, scale.steps)
        resident = engine.stats.soft_prompts_resident
    what = f"{scale.batch} sharing a Cartridge of {scale.cartridge}"
    results.add_speed(f"step of {what}", 1000 * spent, "ms")
    # Earlier soft prompts may have been evicted for it.
    results.add(f"copies of {what}", resident - before, at_most=1)


def add_loads(results: Results, scale: Scale, engine: LLMEngine, folder: Path, length: int) -> None:
    """The longest step while soft prompts are loaded that were never used, over the median without them."""
    sources = draw_soft_prompts(scale, folder, LOADS + 1, length, only_key_values=True)
    half = max(1, scale.batch // 2)
    longest, first, all_seconds = [], [], []
    with running(engine, scale, half) as stepper:
        quiet = statistics.median(step_seconds(stepper.step, scale, 1) for _ in range(scale.steps))
        for number, source in enumerate(sources):
            name = f"load{number}"
            EngineStepper(engine, [source]).add(name, text(scale, 3000 + number, SHORT_TEXT), 1)
            times = steps_until_token(stepper, [name], scale)
            if number:  # the first one warms up
                longest.append(max(times))
                first.append(sum(times))
                all_seconds += times
    what = f"soft prompt of {length} loaded beside {half}"
    results.add_speed(f"{what}: first token", 1000 * statistics.median(first), "ms")
    results.add_speed(
        f"{what}: longest step over the median",
        max(longest) / quiet,
        "",
        at_most=MOST_OVER_MEDIAN if length == scale.cartridge else None,
        note=f"the median without loads is {1000 * quiet:.2f} ms; {len(all_seconds)} steps with loads",
    )
