"""Compare a decode step with its bare matrix products, for growing batch, context and number of soft prompts.

    python -m benchmarks.step_cost [--plot benchmarks/step_cost.png]
    OMP_NUM_THREADS=1 python -m benchmarks.step_cost --rest

Uses a model of 135M shape with random weights, in the dtype that is fast on the machine. The engine runs decode steps
of N sequences with the given context length, which use a number of soft prompts of 20 tokens in turn. The bare
products are the model's linear layers in the engine's layout, each applied to N rows in order. Steps and products
alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib import pyplot as plt
from torch import nn

from benchmarks.ways import default_dtype, machine
from benchmarks.workload import HIDDEN_SIZE, VOCABULARY, build_model, build_soft_prompts, soft_prompt_source
from server.config import EngineSettings
from server.engine.cpu import packed_linear
from server.engine.cpu.packed_linear import PackedLinear
from server.engine.llm_engine import LLMEngine
from server.engine.types import GenerateRequest, SamplingParams, SoftPromptSource

STEPS = 12
BATCHES = (1, 4, 16, 64, 128)
CONTEXTS = (64, 256, 1024)
PROMPTS = (0, 1, 16, 64)
BATCH, CONTEXT, COUNT = 64, 128, 16
"""The values of the two other parameters while one is varied."""


class Products:
    """The matrix products of an engine's model, in the engine's layout, without the rest of a step."""

    def __init__(self, engine: LLMEngine) -> None:
        model: nn.Module = engine.runner.model
        linears = (PackedLinear, nn.Linear)
        self._runner = engine.runner
        self._head: nn.Module | None = engine.runner.model.get_output_embeddings()
        self._modules = [module for module in model.modules() if isinstance(module, linears)]

    def flops(self, rows: int, sampled: int) -> int:
        """Floating-point operations of ``work``."""
        return sum(
            2 * (sampled if module is self._head else rows) * module.in_features * module.out_features
            for module in self._modules
        )

    def work(self, rows: int, sampled: int) -> Callable[[], object]:
        """Each layer in order over ``rows`` random rows; the vocabulary head over ``sampled`` rows."""
        heights = [sampled if module is self._head else rows for module in self._modules]
        shapes = [(height, module.in_features) for height, module in zip(heights, self._modules, strict=True)]
        drawn = {
            shape: torch.randn(*shape, dtype=self._runner.dtype, device=self._runner.device) for shape in set(shapes)
        }
        pairs = [(module, drawn[shape]) for module, shape in zip(self._modules, shapes, strict=True)]

        def products() -> None:
            for module, inputs in pairs:
                module(inputs)  # the output is released at once, as in a step

        return products

    @torch.inference_mode()
    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of some work on the engine's device."""
        started = time.perf_counter()
        work()
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


class Bench:
    """One engine, and the matrix products of its model.

    Args:
        engine: An engine that can hold the largest batch.
        sources: Soft prompts that the sequences use in turn.
    """

    def __init__(self, engine: LLMEngine, sources: Sequence[SoftPromptSource]) -> None:
        self._engine = engine
        self._sources = sources
        self._products = Products(engine)

    def step_and_products(self, batch: int, context: int, prompts: int) -> tuple[float, float]:
        """Median seconds of a decode step, and of its bare products."""
        self._start(batch, context, prompts)
        bare = self._products.work(batch, sampled=batch)
        steps, products = [], []
        for _ in range(STEPS):
            steps.append(self._products.timed(self._engine.step))
            products.append(self._products.timed(bare))
        self._abort(batch)
        return statistics.median(steps), statistics.median(products)

    def rest(self, batch: int, context: int, prompts: int) -> float:
        """Minimum CPU seconds of a decode step without its products, which return fixed random results.

        The minimum CPU time over many steps on one thread is robust to other load on the machine.
        """
        self._start(batch, context, prompts)
        drawn: dict[tuple[int, ...], torch.Tensor] = {}

        def fixed_product(rows: torch.Tensor, weight: torch.Tensor, *_others: object) -> torch.Tensor:
            shape = (*rows.shape[:-1], weight.shape[0])
            if shape not in drawn:
                drawn[shape] = torch.randn(shape).to(rows.dtype)
            # The layers write sums into the product outputs of this width, so each call returns a copy.
            return drawn[shape].clone() if shape[-1] == HIDDEN_SIZE else drawn[shape]

        seconds = []
        with patch.object(packed_linear, "_product", fixed_product):
            for _ in range(5 * STEPS):
                started = time.process_time()
                self._engine.step()
                seconds.append(time.process_time() - started)
        self._abort(batch)
        return min(seconds)

    def _start(self, batch: int, context: int, prompts: int) -> None:
        """Prefill ``batch`` sequences of ``context`` positions."""
        engine, params = self._engine, SamplingParams(max_tokens=512, temperature=0.0, ignore_eos=True)
        for index in range(batch):
            source = self._sources[index % prompts] if prompts else None
            length = max(1, context - (source.num_virtual_tokens if source else 0))
            text = [(7919 * index + 31 * position) % VOCABULARY for position in range(length)]
            engine.add(
                GenerateRequest(request_id=f"{index}", prompt_token_ids=text, params=params, soft_prompt=source)
            )
        while sum(seq.num_new_tokens > 0 for seq in engine.scheduler.running) < batch:
            engine.step()

    def _abort(self, batch: int) -> None:
        for index in range(batch):
            self._engine.abort(f"{index}")


def plot(tables: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    """Plot one panel per varied parameter."""
    figure, panels = plt.subplots(1, len(tables), figsize=(12, 3.6), layout="constrained")
    for panel, (name, table) in zip(panels, tables.items(), strict=True):
        panel.plot(list(table), [1000 * step for step, _ in table.values()], "o-", label="decode step")
        panel.plot(list(table), [1000 * bare for _, bare in table.values()], "s--", label="bare products")
        panel.set(xlabel=name, ylabel="ms", ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--enforce-eager", action="store_true", help="do not use CUDA graphs for decode steps")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rest", action="store_true", help="only measure a step's CPU time without its products")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(folder, layers=arguments.layers)
        folders = build_soft_prompts(model, folder, count=max(PROMPTS), num_virtual_tokens=20)
        sources = [soft_prompt_source(path, index, 20) for index, path in enumerate(folders)]
        settings = EngineSettings(
            model=str(model),
            dtype=arguments.dtype,
            enable_prefix_caching=False,
            max_num_batched_tokens=1024,
            enforce_eager=arguments.enforce_eager,
        )
        engine = LLMEngine(settings)
        bench = Bench(engine, sources)
        bench.step_and_products(4, 32, 1)  # warm-up
        if arguments.rest:
            for batch in BATCHES:
                print(f"{batch:5d} rows, 24 positions: {1000 * bench.rest(batch, 24, 1):7.2f} ms of CPU", flush=True)
            engine.close()
            return
        tables: dict[str, dict[int, tuple[float, float]]] = {
            "batch": {batch: bench.step_and_products(batch, CONTEXT, min(batch, COUNT)) for batch in BATCHES},
            "context": {context: bench.step_and_products(BATCH, context, COUNT) for context in CONTEXTS},
            "soft prompts": {prompts: bench.step_and_products(BATCH, CONTEXT, prompts) for prompts in PROMPTS},
        }
        engine.close()
    print(f"{machine()}, {arguments.dtype}; others at batch {BATCH}, context {CONTEXT}, {COUNT} soft prompts")
    for growing, table in tables.items():
        for value, (step, bare) in table.items():
            print(f"{growing:12s} {value:5d}  step {1000 * step:7.1f} ms  products {1000 * bare:7.1f} ms", end="")
            print(f"  ratio {step / bare:.2f}")
    print(
        json.dumps(
            {f"step_over_products_at_{BATCH}": round(tables["batch"][BATCH][0] / tables["batch"][BATCH][1], 3)}
        )
    )
    if arguments.plot:
        plot(tables, arguments.plot)


if __name__ == "__main__":
    main()
