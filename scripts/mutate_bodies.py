"""Send mutated bodies to a server during a stream, and compare the stream's longest gap with an idle server's.

    python -m scripts.mutate_bodies [--bodies 1000] [--seed 1]

A mutation is one of: a wrong type or a huge number in a field, deep nesting, a long string or list, invalid UTF-8,
invalid JSON, a pattern or schema that is slow to compile. Each must get a status below 500 within seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import serving
from server.demo.tour import MODEL_DIRECTORY

PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1, "temperature": 1.0, "stop": ["a"], "logit_bias": {"5": 1}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "stop": "a"},
    "/v1/classify": {"input": "x", "labels": ["a", "b"]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
FIELDS = (
    "n",
    "top_p",
    "top_k",
    "seed",
    "stop_token_ids",
    "logprobs",
    "stream_options",
    "priority",
    "timeout",
    "task_id",
)
SLOW_PATTERN = "(a+)+" * 20 + "$"


@dataclass(slots=True)
class Result:
    """The result of a run.

    Attributes:
        statuses: Number of answers by status.
        slowest: Latency of the slowest answer, in seconds.
        longest_gap: Longest time between two events of the stream, in seconds.
        faults: Descriptions of wrong answers.
    """

    statuses: dict[int, int] = field(default_factory=dict)
    slowest: float = 0.0
    longest_gap: float = 0.0
    faults: list[str] = field(default_factory=list)


def deep(levels: int) -> bytes:
    """Nested lists as JSON; the standard library's encoder refuses deep nesting."""
    return b"[" * levels + b"]" * levels


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body with one mutation; a few mutations leave the body valid."""
    path = rng.choice([*PATHS])
    body = json.loads(json.dumps(PATHS[path]))
    name = rng.choice([*body, *FIELDS])
    values: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, "", "0", {}, [], [[]], [None], {"a": {"b": []}}, -1, 0.5, 1e308, -1e308]),
        lambda: rng.choice([10**400, -(10**400), 2**63, 2**64, -(2**63) - 1]),
        lambda: "x" * rng.choice([10_000, 1_000_000]),
        lambda: ["x"] * 10_000,
        lambda: list(range(10_000)),
        lambda: [[1] * 100] * 2000,  # more tokens than the context holds
        lambda: "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace") * 100,
        lambda: {str(index): index for index in range(10_000)},
    ]
    kind = rng.randrange(14)
    if kind < len(values):
        body[name] = values[kind]()
    elif kind == len(values):
        body["structured_outputs"] = rng.choice(
            [{"regex": SLOW_PATTERN}, {"regex": "(" * 5000}, {"json": {"$ref": "#"}}, {"choice": ["x"] * 10_000}]
        )
    elif kind == len(values) + 1:
        encoded = json.dumps(body).encode()
        where = rng.randrange(len(encoded))
        return path, encoded[:where] + bytes([rng.choice([0, 255, 192])]) + encoded[where:]
    elif kind == len(values) + 2:
        encoded = json.dumps(body | {name: "?"}).encode()
        return path, encoded.replace(b'"?"', deep(rng.choice([100, 100_000])))
    elif kind == len(values) + 3:
        return path, json.dumps(body).encode()[: rng.randrange(1, 10)]
    else:
        body["prompt" if path != "/v1/classify" else "input"] = "y" * 10_000_000
    return path, json.dumps(body).encode()


async def run(url: str, *, bodies: int, seed: int) -> tuple[Result, Result]:
    """Stream on an idle server, then while ``bodies`` mutated bodies are sent.

    Returns:
        The results without and with the bodies.
    """
    rng = random.Random(seed)
    quiet, loud = Result(), Result()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await stream(client, quiet, asyncio.create_task(asyncio.sleep(5)))
        await stream(client, loud, asyncio.create_task(send_all(client, loud, [mutated(rng) for _ in range(bodies)])))
    return quiet, loud


async def send_all(client: httpx.AsyncClient, result: Result, requests: list[tuple[str, bytes]]) -> None:
    """Send the bodies, with four requests in flight."""
    todo = iter(requests)

    async def worker() -> None:
        for path, body in todo:
            started = time.perf_counter()
            response = await client.post(path, content=body, headers={"content-type": "application/json"})
            seconds = time.perf_counter() - started
            result.slowest = max(result.slowest, seconds)
            result.statuses[response.status_code] = result.statuses.get(response.status_code, 0) + 1
            if response.status_code >= 500 or (response.status_code >= 400 and "error" not in response.json()):
                result.faults.append(f"{path} {body[:200]!r}: {response.status_code} {response.text[:300]}")

    await asyncio.gather(*(worker() for _ in range(4)))


async def stream(client: httpx.AsyncClient, result: Result, until: asyncio.Task[None]) -> None:
    """Stream until the task ``until`` has ended, and record the longest gap."""
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    while not until.done():
        async with client.stream("POST", "/v1/completions", json=body) as response:
            newest: float | None = None
            async for _ in response.aiter_lines():
                now = time.perf_counter()
                result.longest_gap = max(result.longest_gap, now - newest if newest is not None else 0.0)
                newest = now
                if until.done():
                    break
    await until


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    flags = ("--dtype", "float32", "--kv-cache-memory", "64MiB")
    with tempfile.TemporaryDirectory() as store, serving(MODEL_DIRECTORY, Path(store), *flags) as url:
        quiet, loud = asyncio.run(run(url, bodies=args.bodies, seed=args.seed))
    print(f"statuses {dict(sorted(loud.statuses.items()))}, slowest answer {loud.slowest:.2f} s")
    print(f"longest gap without {quiet.longest_gap * 1e3:.0f} ms, with {loud.longest_gap * 1e3:.0f} ms")
    for fault in loud.faults:
        print(fault)
    raise SystemExit(1 if loud.faults else 0)


if __name__ == "__main__":
    main()
