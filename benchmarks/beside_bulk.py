"""Measure the first token of interactive requests beside a bulk run with the same soft prompt, and the run itself.

    python -m benchmarks.beside_bulk [--rows 600] [--requests 30] [--layers 30] [--pause 1] [--dtype float32]

The server has a model of 135M shape with random weights. Three phases follow each other: interactive requests alone,
``prelude run`` alone, and both together. One client sends the interactive requests, one at a time with pauses, and
takes the time to the first token of each stream. Every phase has new texts, and the prefix cache is off. Processors
without AVX-512 emulate bfloat16, so the default is float32.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import httpx

from benchmarks.bulk import WORDS
from benchmarks.server import build_served_model, serving, soft_prompt_files
from tests.support.processes import PRELUDE

FLAGS = ["--no-enable-prefix-caching", "--allow-other-base"]
NAME = "bench-prompt"
WORDS_PER_TEXT = 20
NEW_TOKENS = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--pause", type=float, default=1.0, help="mean pause between requests, in seconds")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_served_model(folder / "model", layers=args.layers)
        with serving(model, folder / "store", "--dtype", args.dtype, *FLAGS) as url:
            upload(url, args.layers)
            first_tokens(url, args, seed=1, limit=5)
            run(url, folder, min(100, args.rows), seed=2)
            report(url, folder, args)


def report(url: str, folder: Path, args: argparse.Namespace) -> None:
    """Run the three phases, and print their figures and ratios."""
    idle = first_tokens(url, args, seed=3, limit=args.requests)
    print(f"idle: first token {shown(idle)}", flush=True)
    alone = run(url, folder, args.rows, seed=4)
    print(f"run alone: {alone:.1f} rows/s", flush=True)
    rates: list[float] = []
    bulk = threading.Thread(target=lambda: rates.append(run(url, folder, args.rows, seed=5)))
    bulk.start()
    time.sleep(2.0)  # the command starts
    beside = first_tokens(url, args, seed=6, limit=None, during=bulk)
    bulk.join()
    print(f"together: first token {shown(beside)}; run: {rates[0]:.1f} rows/s", flush=True)
    ratio = statistics.median(beside) / statistics.median(idle)
    print(f"first token: {ratio:.2f} times idle; run: {rates[0] / alone:.2f} of alone", flush=True)


def upload(url: str, layers: int) -> None:
    """Upload a random soft prompt."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", pair) for pair in zip(names, soft_prompt_files(0, layers=layers), strict=True)]
    httpx.post(f"{url}/v1/prompts", data={"id": NAME}, files=files, timeout=120).raise_for_status()


def text(rng: random.Random) -> str:
    """A text that was not sent before."""
    return " ".join(rng.choice(WORDS) for _ in range(WORDS_PER_TEXT))


def run(url: str, folder: Path, count: int, *, seed: int) -> float:
    """``prelude run`` over new rows; returns its rows per second."""
    rng, source = random.Random(seed), folder / f"in-{seed}.jsonl"
    source.write_text("".join(json.dumps({"text": text(rng)}) + "\n" for _ in range(count)))
    command = [*PRELUDE, "run", NAME, str(source), str(folder / f"out-{seed}.jsonl"), "--url", url, "--json"]
    done = subprocess.run([*command, "--max-tokens", str(NEW_TOKENS)], check=True, capture_output=True, text=True)
    rate: float = json.loads(done.stdout)["rows_per_second"]
    return rate


def first_tokens(
    url: str,
    args: argparse.Namespace,
    *,
    seed: int,
    limit: int | None,
    during: threading.Thread | None = None,
) -> list[float]:
    """Seconds to the first token of each request, for a number of requests or as long as a thread runs."""
    rng, found = random.Random(seed), list[float]()
    with httpx.Client(base_url=url, timeout=120) as client:
        while (during is None or during.is_alive()) and (limit is None or len(found) < limit):
            body = {"model": NAME, "prompt": text(rng), "max_tokens": NEW_TOKENS, "stream": True}
            # Most tokens of a random model have no text; with this field they have a chunk too.
            body["return_timings"] = True
            started = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                lines = response.iter_lines()
                next(line for line in lines if line.startswith("data:"))
                found.append(time.perf_counter() - started)
                for _ in lines:
                    pass
            time.sleep(args.pause * rng.uniform(0.5, 1.5))
    return found


def shown(seconds: list[float]) -> str:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return f"median {1000 * statistics.median(ordered):.0f} ms, p95 {1000 * p95:.0f} ms of {len(ordered)}"


if __name__ == "__main__":
    main()
