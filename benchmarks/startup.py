"""Seconds from ``prelude demo`` to ready, of checkouts in turns: ``python -m benchmarks.startup BEFORE AFTER``.

Both run in this environment. The first round is not counted: it compiles the kernels and warms the disk's cache.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from server.cli import main; main()", "demo", "--port", "0"]
READY = "Ready after"


def start(checkout: Path) -> tuple[float, float]:
    """Start the demo of a checkout and end it when it is ready; returns seconds until then, and of the processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(COMMAND, cwd=checkout, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise AssertionError("its output is a pipe")
        seconds = next((time.perf_counter() - started for line in process.stdout if READY in line), None)
        process.terminate()
        process.stdout.read()
    if seconds is None:
        raise RuntimeError(f"the demo of {checkout} did not start")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, and print each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, help="the first is the one to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="0 only compiles and warms")
    arguments = parser.parse_args()
    rounds: list[list[float]] = []
    for number in range(arguments.rounds + 1):
        found = [start(checkout) for checkout in arguments.checkouts]
        words = ", ".join(f"{seconds:.2f} s ({cpu:.1f} s of processors)" for seconds, cpu in found)
        print(f"round {number}: {words}", flush=True)
        rounds.append([seconds for seconds, _ in found])
    if len(rounds) == 1:
        return
    first, *others = (list(column) for column in zip(*rounds[1:], strict=True))
    print(f"{arguments.checkouts[0]}: median {statistics.median(first):.2f} s")
    for checkout, column in zip(arguments.checkouts[1:], others, strict=True):
        ratio = statistics.median(own / base for own, base in zip(column, first, strict=True))
        print(f"{checkout}: median {statistics.median(column):.2f} s, median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
