"""Compare classification in one request with one completion request per label.

    python -m benchmarks.classify [--inputs 8] [--labels 8] [--tokens 128] [--rounds 5] [--model DIR]

Both score the same labels for the same number of texts on the same server, in turn: one ``/v1/classify`` request for
all inputs and labels, or one ``/v1/completions`` request with ``echo``, ``logprobs`` and ``max_tokens`` 0 for each
input and label, all concurrently. Every round has new texts, so nothing is cached from the round before.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import BASE, serving
from server.demo.tour import MODEL_DIRECTORY

VOCABULARY = range(10, 1500)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIRECTORY)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--labels", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store, serving(args.model, Path(store)) as url:
        asyncio.run(measure(url, args))


async def measure(url: str, args: argparse.Namespace) -> None:
    """Measure both in turn, and compare them round by round."""
    rng = random.Random(0)
    labels = [f" label {index}" for index in range(args.labels)]
    ratios = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        tails: list[list[int]] = [
            (await post(client, "/tokenize", {"prompt": label, "add_special_tokens": False}))["tokens"]
            for label in labels
        ]
        for number in range(args.rounds + 1):
            texts = [[rng.choice(VOCABULARY) for _ in range(args.tokens)] for _ in range(args.inputs)]
            started = time.perf_counter()
            answer = await post(client, "/v1/classify", {"model": BASE, "input": texts, "labels": labels})
            shared = time.perf_counter() - started
            fresh = [[rng.choice(VOCABULARY) for _ in range(args.tokens)] for _ in range(args.inputs)]
            started = time.perf_counter()
            echo = {"model": BASE, "echo": True, "logprobs": 0, "max_tokens": 0}
            await asyncio.gather(
                *(
                    post(client, "/v1/completions", {**echo, "prompt": text + tail})
                    for text in fresh
                    for tail in tails
                )
            )
            apart = time.perf_counter() - started
            if number:  # round 0 is the warm-up
                ratios.append(apart / shared)
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                print(f"classify {shared:.3f} s, completions {apart:.3f} s, ratio {ratios[-1]:.2f}, cached {cached}")
    print(f"median ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


async def post(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> dict[str, Any]:
    """Send a request that must succeed; returns the answer's JSON."""
    response = await client.post(path, json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


if __name__ == "__main__":
    main()
