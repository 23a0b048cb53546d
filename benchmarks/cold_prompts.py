"""Compare the time to the first token with an unused soft prompt and with a warm one.

    python -m benchmarks.cold_prompts [--prefix] [--dtype float32]

The server has 10,000 registered soft prompts of 20 tokens, on a model of 135M shape. Requests run one at
a time: first with a random soft prompt that was never used, then with one of eight that are on the device, each with
a new text of 64 tokens. A cold request must look up the name, verify and read the file, copy the rows to the device,
and, for prompt tuning, compute their keys and values.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.server import BASE, build_served_model, serving, soft_prompt_files
from prompt_store.open_store import open_store
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, BaseModelSpec

NUM_WARM = 8


def register(store_path: Path, count: int, *, layers: int, is_prefix: bool, dtype: str) -> None:
    """Publish ``count`` soft prompts."""
    base = BaseModelSpec(BASE, 576, layers, 3, 64, 2048, dtype)
    store = open_store(store_path)
    for index in range(count):
        with store.upload() as upload:
            files = soft_prompt_files(index, layers=layers, is_prefix=is_prefix)
            for filename, data in zip((CONFIG_FILE, WEIGHTS_FILE), files, strict=True):
                with upload.open(filename) as file:
                    file.write(data)
            store.publish(upload, name=f"p{index}", base=base)
    store.close()


def first_token_seconds(client: httpx.Client, model: str, text: list[int]) -> float:
    """Seconds from sending a request to its first event."""
    body = {"model": model, "prompt": text, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        seconds = time.perf_counter() - started
        if response.status_code != 200 or not first.startswith("data: {"):
            raise RuntimeError(f"{response.status_code} {first}")
        for _ in lines:
            pass
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--prefix", action="store_true", help="prefix tuning instead of prompt tuning")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_served_model(folder, layers=arguments.layers)
        started = time.perf_counter()
        register(
            folder / "store",
            arguments.count,
            layers=arguments.layers,
            is_prefix=arguments.prefix,
            dtype=arguments.dtype,
        )
        print(f"{arguments.count} published in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        drawn = rng.sample(range(arguments.count), arguments.requests + NUM_WARM)
        warm, cold = drawn[:NUM_WARM], drawn[NUM_WARM:]

        def text() -> list[int]:
            return [rng.randrange(1, 2000) for _ in range(arguments.text_tokens)]

        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        with (
            serving(model, folder / "store", "--kv-cache-memory", "1GiB", "--dtype", arguments.dtype) as url,
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            for index in warm:
                for _ in range(2):
                    first_token_seconds(client, f"p{index}", text())
            for turn, index in enumerate(cold):
                seconds["cold"].append(first_token_seconds(client, f"p{index}", text()))
                seconds["warm"].append(first_token_seconds(client, f"p{warm[turn % NUM_WARM]}", text()))
    figures = {
        "registered": arguments.count,
        "dtype": arguments.dtype,
        "method": "PREFIX_TUNING" if arguments.prefix else "PROMPT_TUNING",
        "requests_of_each": arguments.requests,
        **{f"{kind}_median_ms": round(1000 * statistics.median(values), 1) for kind, values in seconds.items()},
        **{
            f"{kind}_p95_ms": round(1000 * statistics.quantiles(values, n=20)[-1], 1)
            for kind, values in seconds.items()
        },
        "cold_over_warm_at_the_median": round(
            statistics.median(seconds["cold"]) / statistics.median(seconds["warm"]), 2
        ),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
