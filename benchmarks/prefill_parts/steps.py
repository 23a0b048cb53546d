"""A prefill step against its bare products, and against the processor's measured peak."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.step_cost import Products
from benchmarks.workload import VOCABULARY
from server.engine.cpu import packed_linear
from server.engine.cpu.packed_linear import PackedLinear, can_pack
from server.engine.llm_engine import LLMEngine
from server.engine.types import GenerateRequest, SamplingParams

SQUARE = 4096
"""Rows and columns of the square product that measures the peak."""


def square_products(dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]:
    """A large square product by each library that the engine may use."""
    left, right = (torch.randn(SQUARE, SQUARE, dtype=dtype, device=device) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: torch.mm(left, right)]
    if device.type == "cpu" and can_pack(dtype):
        linear = nn.Linear(SQUARE, SQUARE, bias=False, dtype=dtype).requires_grad_(requires_grad=False)
        with patch.object(packed_linear, "ROWS_HINT", SQUARE):
            packed = PackedLinear(linear)
        ways.append(lambda: packed(left))
    return ways


def prefill_step(engine: LLMEngine, products: Products, count: int, length: int) -> float:
    """Seconds of one step that computes ``count`` texts of ``length`` tokens.

    Raises:
        RuntimeError: If the texts do not fit into one step.
    """
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for index in range(count):
        text = [(7919 * index + 31 * position) % VOCABULARY for position in range(length)]
        engine.add(GenerateRequest(request_id=f"{index}", prompt_token_ids=text, params=params))
    seconds = products.timed(engine.step)
    if engine.num_unfinished:
        raise RuntimeError(f"{count} texts of {length} tokens need more than one step")
    return seconds


def compare(engine: LLMEngine, count: int, length: int, rounds: int) -> dict[str, float]:
    """Run steps, their products and large square products in turn.

    Args:
        engine: An engine without work and without prefix caching.
        count: Number of texts in the step.
        length: Number of tokens of each text.
        rounds: Number of rounds after the warm-up.

    Returns:
        Medians over the rounds: milliseconds, the step's time over that of its products, and the share of the peak
        that the products reach, and the step with the same operations.
    """
    products = Products(engine)
    rows = count * length
    bare, flops = products.work(rows, sampled=count), products.flops(rows, sampled=count)
    squares = square_products(engine.runner.dtype, engine.runner.device)
    steps, alone, peaks = [], [], []
    for number in range(rounds + 1):
        step, product = prefill_step(engine, products, count, length), products.timed(bare)
        seconds = min(products.timed(square) for square in squares * 2)
        if number:  # round 0 is the warm-up
            steps.append(step)
            alone.append(product)
            peaks.append(2 * SQUARE**3 / seconds)
    triples = list(zip(steps, alone, peaks, strict=True))
    figures = {
        "texts": count,
        "tokens_per_text": length,
        "step_milliseconds": round(1000 * statistics.median(steps), 2),
        "products_milliseconds": round(1000 * statistics.median(alone), 2),
        "peak_gflops": round(statistics.median(peaks) / 1e9, 1),
        "step_over_products": round(statistics.median(step / product for step, product, _ in triples), 3),
        "products_share_of_peak": round(statistics.median(flops / product / peak for _, product, peak in triples), 3),
        "step_share_of_peak": round(statistics.median(flops / step / peak for step, _, peak in triples), 3),
    }
    print(
        f"{count} x {length} tokens: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True
    )
    return figures
