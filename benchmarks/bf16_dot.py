"""Compare decode steps with and without VDPBF16PS in attention, in alternating processes.

    python -m benchmarks.bf16_dot

Needs a processor with AVX512_BF16. Uses a model of 135M shape with random weights in bfloat16, and 64 sequences, at
128 and 1,024 positions. Setting ``NUMBA_CPU_FEATURES`` to the processor's features without avx512bf16 makes the
kernels convert to float32 instead (``server/engine/cpu/bf16_dot.py``). Prints the medians over the rounds and their
ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from llvmlite import binding

from benchmarks.step_cost import Bench
from benchmarks.ways import machine
from benchmarks.workload import build_model
from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine

FEATURE = "avx512bf16"
BATCH, CONTEXTS = 64, (128, 1024)


def measure(model: Path) -> dict[str, float]:
    """Median milliseconds of a decode step by context length, in this process."""
    engine = LLMEngine(EngineSettings(model=str(model), dtype="bfloat16", max_num_batched_tokens=1024))
    bench = Bench(engine, [])
    bench.step_and_products(4, 32, 0)  # warm-up
    steps = {str(context): 1000 * bench.step_and_products(BATCH, context, 0)[0] for context in CONTEXTS}
    engine.close()
    return steps


def measure_apart(model: Path, features: str | None) -> dict[str, float]:
    """Run ``measure`` in a separate process with the given processor features; None enables all features."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CPU_FEATURES"}
    if features is not None:
        environment["NUMBA_CPU_FEATURES"] = features
    command = [sys.executable, "-m", "benchmarks.bf16_dot", "--measure", str(model)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    steps: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=Path, help="measure this model in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    host = binding.get_host_cpu_features()
    if not host.get(FEATURE):
        sys.exit("this processor has no AVX512_BF16")
    host[FEATURE] = False
    ways = {"with": None, "without": host.flatten()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder), layers=arguments.layers)
        for _ in range(arguments.rounds):
            for name, features in ways.items():
                rounds[name].append(measure_apart(model, features))
    print(f"{machine()}, {BATCH} sequences")
    for context in map(str, CONTEXTS):
        with_it, without = (statistics.median(steps[context] for steps in rounds[name]) for name in ways)
        print(f"{context:>5s} positions: {with_it:.1f} ms with VDPBF16PS, {without:.1f} ms without,", end=" ")
        print(f"ratio {without / with_it:.3f}")


if __name__ == "__main__":
    main()
