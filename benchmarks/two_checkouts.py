"""Compare the speed of two checkouts side by side in one run.

    python -m benchmarks.two_checkouts BEFORE [--rounds 9] [--parts mixed bulk]

``BEFORE`` is another checkout of this project (``git worktree add ../before COMMIT``). Each checkout runs in a
separate process of this interpreter, with its own code and its own ``benchmarks`` package, on the same work:

- ``mixed``: the mixed batch of ``benchmarks.mixed_batch`` (64 requests over 16 soft prompts), and the same texts
  without soft prompts, which gives the prompt tax;
- ``bulk``: ``prelude run`` over rows for the embedded model, against a server of the same checkout.

The processes take turns, in an order that alternates with each round. The figures are the medians of the ratios per
round: the time of this checkout divided by the time of ``BEFORE``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from benchmarks.ways import machine

HERE = Path(__file__).resolve().parent.parent
SIDE = HERE / "benchmarks" / "peers" / "checkout.py"
WORK = {"mixed": ("mixed", "bare"), "bulk": ("bulk",)}
PAUSE_SECONDS = 0.5
"""Pause before each turn; threads of the other process may still spin for a while."""


class Side:
    """The process of one checkout, which runs work by name."""

    def __init__(self, requests: IO[str], replies: IO[str]) -> None:
        self._requests = requests
        self._replies = replies

    def run(self, work: str) -> float:
        """Run the named work; returns its duration in seconds.

        Raises:
            RuntimeError: If the process ended.
        """
        time.sleep(PAUSE_SECONDS)
        self._requests.write(f"{work}\n")
        self._requests.flush()
        reply = self._replies.readline()
        if not reply:
            raise RuntimeError("the process of a checkout ended; its error is printed above")
        return float(json.loads(reply)["seconds"])


@contextmanager
def side(checkout: Path, part: str) -> Iterator[Side]:
    """Run the process of a checkout until the block ends."""
    process = subprocess.Popen(
        [sys.executable, SIDE, part],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    try:
        yield Side(process.stdin, process.stdout)
    finally:
        process.stdin.close()
        process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=sorted(WORK), default=sorted(WORK))
    arguments = parser.parse_args()
    figures: dict[str, object] = {"machine": machine()}
    for part in arguments.parts:
        with ExitStack() as stack:
            sides = [stack.enter_context(side(path.resolve(), part)) for path in (arguments.before, HERE)]
            seconds = {work: measure(sides, work, arguments.rounds) for work in WORK[part]}
        for work, rounds in seconds.items():
            ratios = [now / before for before, now in rounds]
            figures[work] = {
                "seconds_before": round(statistics.median(before for before, _ in rounds), 3),
                "seconds_now": round(statistics.median(now for _, now in rounds), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
    print(json.dumps(figures, indent=2))


def measure(sides: list[Side], work: str, rounds: int) -> list[tuple[float, float]]:
    """Seconds of the work in both checkouts, (before, now) per round, after one warm-up round."""
    found = []
    for index in range(rounds + 1):
        order = (0, 1) if index % 2 else (1, 0)
        seconds = {number: sides[number].run(work) for number in order}
        found.append((seconds[0], seconds[1]))
    return found[1:]


if __name__ == "__main__":
    main()
