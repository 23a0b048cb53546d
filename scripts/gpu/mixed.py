"""What soft prompts and arriving texts cost the running sequences."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.peers.token_times import measure_token_times
from benchmarks.prefill_parts.first_token import EngineStepper, percentile
from scripts.gpu.device import seconds_of
from scripts.gpu.driving import running, step_seconds, steps_until_token, text
from scripts.gpu.models import Scale, draw_soft_prompts, serving
from scripts.gpu.results import Results
from server.engine.llm_engine import LLMEngine
from server.engine.types import SoftPromptSource

VIRTUAL_TOKENS = 20
MOST_TAX = 1.02
MOST_MIXED = 1.5
ARRIVALS = 8


def run(results: Results, scale: Scale) -> None:
    """Measure the costs."""
    with tempfile.TemporaryDirectory() as folder, serving(scale) as engine:
        num_virtual = min(VIRTUAL_TOKENS, scale.context // 2)
        sources = draw_soft_prompts(scale, Path(folder), scale.batch, num_virtual)
        add_tax(results, scale, engine, sources)
        decode = add_mixed(results, scale, engine)
        add_arrivals(results, scale, engine, sources, decode)


def add_tax(results: Results, scale: Scale, engine: LLMEngine, sources: list[SoftPromptSource]) -> None:
    """Steps over no, one, and as many soft prompts as sequences; all have the same number of keys."""
    ways = {0: [], 1: sources[:1], scale.batch: sources}
    seconds: dict[int, list[float]] = {count: [] for count in ways}
    for turn in range(scale.rounds + 1):
        for count, used in ways.items():
            with running(engine, scale, scale.batch, used) as stepper:
                spent = step_seconds(stepper.step, scale, scale.steps)
            if turn:  # the first turn warms up
                seconds[count].append(spent)
    for count in ways:
        spent = 1000 * statistics.median(seconds[count])
        results.add_speed(f"step of {scale.batch} over {count} soft prompts", spent, "ms", is_detail=count > 0)
    for count in list(ways)[1:]:
        tax = statistics.median(one / none for one, none in zip(seconds[count], seconds[0], strict=True))
        results.add_speed(
            f"{count} soft prompts over none", tax, "", at_most=MOST_TAX if count == scale.batch else None
        )


def add_mixed(results: Results, scale: Scale, engine: LLMEngine) -> float:
    """Steps in which texts are computed beside the running sequences; returns the seconds of a decode step."""
    with running(engine, scale, scale.batch) as stepper:
        decode = step_seconds(stepper.step, scale, scale.steps)
        for count in scale.chunks:
            products = product_seconds(scale, count * scale.chunk)
            spent = []
            for turn in range(scale.rounds + 1):
                names = [f"text{count}-{turn}-{number}" for number in range(count)]
                for number, name in enumerate(names):
                    stepper.add(name, text(scale, 1000 + number, scale.chunk), 1)
                times = steps_until_token(stepper, names, scale)
                if turn:
                    spent.append(sum(times) - (len(times) - 1) * decode)
            ratio = statistics.median(spent) / (decode + products)
            name = f"{count} chunks of {scale.chunk}"
            step = 1000 * statistics.median(spent)
            results.add_speed(f"step with {name}", step, "ms", is_detail=True)
            results.add_speed(
                f"{name}, over decodes and products",
                ratio,
                "",
                at_most=MOST_MIXED if count == max(scale.chunks) else None,
                note=f"{step:.2f} ms; decodes {1000 * decode:.2f} ms, products {1000 * products:.2f} ms",
            )
    return decode


def product_seconds(scale: Scale, rows: int) -> float:
    """Seconds of the products of all layers over some rows; the weights of one layer serve for all.

    They are larger than the caches of the device at the full scale.
    """
    shapes = scale.shape.layer_products

    def drawn(height: int, width: int) -> torch.Tensor:
        return torch.randn(height, width, dtype=scale.dtype, device=scale.device)

    pairs = [(drawn(rows, width), drawn(width, height)) for width, height in shapes]

    def layer() -> None:
        for inputs, weight in pairs:
            torch.mm(inputs, weight)

    return scale.shape.layers * seconds_of(layer, scale.device)


def add_arrivals(
    results: Results, scale: Scale, engine: LLMEngine, sources: list[SoftPromptSource], decode: float
) -> None:
    """Texts that arrive one after another beside running sequences."""
    times = measure_token_times(
        EngineStepper(engine, sources),
        [text(scale, 2000 + number, 4 * scale.chunk) for number in range(ARRIVALS)],
        [text(scale, number, scale.context // 2) for number in range(scale.batch)],
        steps_between=4,
        decode_tokens=min(512, scale.max_model_len // 2),
    )
    what = f"{4 * scale.chunk} tokens arriving beside {scale.batch}"
    results.add_speed(f"{what}: first token", 1000 * statistics.median(times.first_token), "ms")
    results.add_speed(f"{what}: gap", 1000 * statistics.median(times.gaps), "ms")
    results.add_speed(
        f"{what}: gap p99",
        1000 * percentile(times.gaps, 99),
        "ms",
        note=f"a decode step takes {1000 * decode:.2f} ms",
    )
