"""Compare ``prelude run`` with a minimal load generator, and test its memory and its restart after kills.

    python -m benchmarks.bulk [--rows 6000] [--rounds 4] [--long-rows 100000] [--kind classify|complete]

Two processes take turns to send the same rows to the same server: ``prelude run``, from file to file, and a minimal
load generator (``benchmarks.bulk_load``) with the same number of requests in flight and rows per request. Each round
has new texts, the same for both, and the prefix cache is off, so the second one has no advantage. The CPU time of
both processes is measured too, because they share the cores with the server.

Then ``prelude run`` processes ``--long-rows`` rows while its memory is sampled. SIGKILL ends it after a third and
after two thirds of the rows, and it is restarted each time. The output is compared with the input row by row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.server import serving
from server.client.bulk.sender import SendLimits
from server.demo.tour import HELDOUT_DIRECTORY, MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.support.processes import PRELUDE

FLAGS = ["--no-enable-prefix-caching", "--allow-other-base"]

WORDS = ["lamp", "strap", "kettle", "bicycle", "phone", "chair", "bag", "clock"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--long-rows", type=int, default=100_000)
    parser.add_argument("--kind", choices=("classify", "complete"), default="complete")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(MODEL_DIRECTORY, folder / "store", *FLAGS) as url:
            push = [*PRELUDE, "push", str(SOFT_PROMPTS_DIRECTORY / "sentiment"), "--id", "sentiment", "--url", url]
            subprocess.run(push, check=True)
            compare(folder, url, args)
            if args.long_rows:
                run_long(folder, url, args)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Write ``count`` distinct texts like those that the soft prompt was trained on."""
    texts = [json.loads(line)["input"] for line in (HELDOUT_DIRECTORY / "sentiment.jsonl").read_text().splitlines()]
    rng = random.Random(seed)
    with path.open("w") as file:
        for index in range(count):
            text = f"My {rng.choice(WORDS)} {rng.choice(WORDS)} is here. {rng.choice(texts)}"
            file.write(json.dumps({"id": f"{seed}-{index}", "text": text}) + "\n")


def command(source: Path, output: Path, url: str, kind: str) -> list[str]:
    """The measured ``prelude run`` command, with default options except for the task."""
    task = ["--labels", r"\npositive,\nnegative"] if kind == "classify" else ["--max-tokens", "2"]
    return [*PRELUDE, "run", "sentiment", str(source), str(output), *task, "--json", "--url", url]


@dataclass(frozen=True)
class Finished:
    """The figures of one process.

    Attributes:
        rate: Rows per second as the process reports it, which excludes its startup.
        cpu_seconds: CPU time of the process, including its startup.
    """

    rate: float
    cpu_seconds: float


def run_side(which: str, source: Path, output: Path, url: str, kind: str) -> Finished:
    """Run ``bulk`` or ``load`` in a separate process."""
    limits = SendLimits()
    line = [sys.executable, "-m", "benchmarks.bulk_load", str(source), url, kind]
    line += [str(limits.concurrency), str(limits.rows_per_request)]
    if which == "bulk":
        line = command(source, output, url, kind)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read() if process.stdout is not None else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{which} ended with {os.waitstatus_to_exitcode(status)}: {printed}")
    rate = json.loads(printed)["rows_per_second"] if which == "bulk" else float(printed)
    return Finished(rate, usage.ru_utime + usage.ru_stime)


def compare(folder: Path, url: str, args: argparse.Namespace) -> None:
    """Run both sides in alternating order, round by round.

    The CPU time of a run of one row is subtracted, which excludes the startup.
    """
    source = folder / "one.jsonl"
    write_rows(source, 1, 0)
    starts = dict.fromkeys(("bulk", "load"), math.inf)
    for turn in range(3):
        for which, least in starts.items():
            output = folder / f"one-{turn}.jsonl"
            starts[which] = min(least, run_side(which, source, output, url, args.kind).cpu_seconds)
    ratios: list[float] = []
    cpu: dict[str, list[float]] = {"bulk": [], "load": []}
    for number in range(args.rounds + 1):
        source = folder / f"in-{number}.jsonl"
        write_rows(source, args.rows, number)
        order = ("bulk", "load") if number % 2 else ("load", "bulk")
        found = {which: run_side(which, source, folder / f"out-{number}.jsonl", url, args.kind) for which in order}
        if not number:  # warm-up
            continue
        ratios.append(found["bulk"].rate / found["load"].rate)
        for which, times in cpu.items():
            times.append(1e6 * (found[which].cpu_seconds - starts[which]) / args.rows)
        lines = [f"{which} {found[which].rate:.1f} rows/s, {cpu[which][-1]:.0f} us of CPU per row" for which in cpu]
        print(f"{', '.join(lines)}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    for which, times in cpu.items():
        print(f"{which}: median {statistics.median(times):.0f} us of CPU per row", flush=True)


def run_long(folder: Path, url: str, args: argparse.Namespace) -> None:
    """Run many rows, kill the run twice, check the output, and report the memory."""
    source, output = folder / "long.jsonl", folder / "long-out.jsonl"
    write_rows(source, args.long_rows, 1000)
    samples: list[tuple[int, int]] = []
    summary: dict[str, object] = {}
    started, num_kills = time.perf_counter(), 0
    for stop_at in (args.long_rows // 3, 2 * args.long_rows // 3, None):
        process = subprocess.Popen(command(source, output, url, args.kind), stdout=subprocess.PIPE)
        watched = psutil.Process(process.pid)
        written = LineCounter(output)
        while process.poll() is None:
            time.sleep(0.2)
            try:
                samples.append((written.count(), watched.memory_info().rss))
            except psutil.NoSuchProcess:
                break
            if stop_at is not None and samples[-1][0] >= stop_at:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                num_kills += 1
                break
        if stop_at is None and process.stdout is not None:
            summary = json.loads(process.stdout.read())
        process.wait()
    seconds = time.perf_counter() - started
    expected = [json.loads(line) for line in source.read_text().splitlines()]
    found = [json.loads(line) for line in output.read_text().splitlines()]
    errors = sum("error" in row for row in found)
    same = [{"id": row["id"], "text": row["text"]} for row in found] == expected
    print(f"{args.long_rows} rows in {seconds:.0f} s with {num_kills} kills")
    print(f"{len(found)} rows in the output, {errors} errors")
    print(f"every row once and in order: {same}; the last start found {summary['rows_before']} finished rows")
    for low in range(10):
        part = [rss / 2**20 for count, rss in samples if low <= 10 * count / args.long_rows < low + 1]
        if part:
            share = f"rows {low * 10:3}-{low * 10 + 10} %"
            print(f"{share}: median memory {statistics.median(part):.1f} MiB, max {max(part):.1f} MiB", flush=True)


class LineCounter:
    """Counts the lines of a growing file, and reads each byte only once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._count = 0

    def count(self) -> int:
        """The current number of lines."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while chunk := file.read(2**20):
                    self._offset += len(chunk)
                    self._count += chunk.count(b"\n")
        return self._count


if __name__ == "__main__":
    main()
