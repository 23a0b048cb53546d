"""Compare streams during uploads and promotions of soft prompts with undisturbed streams.

    python -m benchmarks.hot_swap [--kind adapter]

The server has a model of 135M shape in bfloat16 and eight soft prompts, or adapters (rank 8 on queries and values).
Each of 32 clients streams one request after another, of 32 to 96 tokens, each with a new text. In half of the
rounds, another client uploads and promotes new versions of the eight names at an even pace, and requests one token
twice after each promotion. In the other half it only requests the same number of tokens. The two kinds of rounds
alternate. The benchmark measures the gaps between the tokens of a stream, streams that failed or ended early, and
answers after a promotion that are not from the new version.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from benchmarks.adapter_parts.files import ATTENTION, write_adapter
from benchmarks.server import build_served_model, serving, soft_prompt_files
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE

NUM_NAMES = 8
TEXT_TOKENS = 32
NEW_TOKENS = (32, 96)
"""Range of the random lengths; streams of equal length would all end and start in the same step."""


MakeFiles = Callable[[int], Sequence[bytes]]
"""Makes the configuration and the weights of a version, by a seed."""


@dataclass
class Tally:
    """The results of one kind of round.

    Attributes:
        gaps: Seconds between the tokens of one stream.
        rounds: The 99th percentile of the gaps of each round, in milliseconds.
        num_streams: Number of streams with all their tokens.
        failures: Descriptions of failures.
        num_changes: Number of uploads and promotions.
        num_tokens: Number of streamed tokens.
        seconds: Total duration of the rounds.
    """

    gaps: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    num_streams: int = 0
    failures: list[str] = field(default_factory=list)
    num_changes: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


def percentile(gaps: Sequence[float], fraction: float) -> float:
    """A percentile of gaps given in seconds, in milliseconds; ``fraction`` is between 0 and 1."""
    return 1000 * sorted(gaps)[int(fraction * (len(gaps) - 1))]


class Round:
    """One round of load.

    Args:
        url: The server.
        make: Makes the files of versions.
        tally: Receives the results.
    """

    def __init__(self, url: str, *, make: MakeFiles, tally: Tally, seed: int) -> None:
        self._url = url
        self._make = make
        self._tally = tally
        self._rng = random.Random(seed)
        self._seed = seed
        self._stopping = asyncio.Event()

    async def run(self, num_streams: int, changes: int, pause: float, *, with_changes: bool) -> None:
        """Stream, and make ``changes`` changes (or only probes) with a pause before each, in seconds."""
        started = time.perf_counter()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            streams = [asyncio.create_task(self._stream(client)) for _ in range(num_streams)]
            await asyncio.sleep(2)
            for number in range(changes):
                await asyncio.sleep(pause)
                name = f"p{number // 2 % NUM_NAMES}"
                if not with_changes:
                    await self._probe(client, name, None)
                elif number % 2 == 0:
                    version = await self._upload(client, name, self._seed * 10_000 + number)
                else:
                    reply = await client.put(f"/v1/prompts/{name}/aliases/latest", json={"version": version})
                    reply.raise_for_status()
                    self._tally.num_changes += 1
                    await self._probe(client, name, f"{name}@{version}")
                    await self._probe(client, name, f"{name}@{version}")
            self._stopping.set()
            await asyncio.gather(*streams)
        self._tally.seconds += time.perf_counter() - started

    async def _stream(self, client: httpx.AsyncClient) -> None:
        while not self._stopping.is_set():
            length = self._rng.randint(*NEW_TOKENS)
            body = {
                "model": f"p{self._rng.randrange(NUM_NAMES)}",
                "prompt": [self._rng.randrange(1, 2000) for _ in range(TEXT_TOKENS)],
                "max_tokens": length,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            count, newest = 0, 0.0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    self._tally.failures.append(f"status {response.status_code}")
                    continue
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self._tally.failures.append(str(event["error"]))
                        break
                    count += len(event["choices"][0].get("token_ids") or ())
                    if newest:
                        self._tally.gaps.append(now - newest)
                    newest = now
            self._tally.num_tokens += count
            if count == length:
                self._tally.num_streams += 1
            else:
                self._tally.failures.append(f"{count} tokens of {length}")

    async def _upload(self, client: httpx.AsyncClient, name: str, seed: int) -> int:
        config, weights = self._make(seed)
        files = [("files", (CONFIG_FILE, config)), ("files", (WEIGHTS_FILE, weights))]
        reply = await client.post("/v1/prompts", data={"id": name, "alias": "candidate"}, files=files)
        reply.raise_for_status()
        self._tally.num_changes += 1
        return int(reply.json()["version"])

    async def _probe(self, client: httpx.AsyncClient, name: str, expected: str | None) -> None:
        text = [self._rng.randrange(1, 2000) for _ in range(TEXT_TOKENS)]
        body = {"model": name, "prompt": text, "max_tokens": 1, "ignore_eos": True}
        reply = await client.post("/v1/completions", json=body)
        served_by = reply.headers.get("x-prelude-prompt")
        if reply.status_code != 200 or (expected is not None and served_by != expected):
            self._tally.failures.append(f"{reply.status_code} from {served_by}, expected {expected}")


def adapter_files(model: Path, seed: int) -> list[bytes]:
    """A random adapter's ``adapter_config.json`` and ``adapter_model.safetensors``."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_adapter(model, Path(name) / "adapter", rank=8, targets=ATTENTION, seed=seed).folder
        return [(folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)]


async def measure(url: str, arguments: argparse.Namespace, make: MakeFiles) -> dict[str, Tally]:
    """Run all rounds; returns the results by kind of round."""
    tallies = {"alone": Tally(), "with changes": Tally()}
    per_round = arguments.changes // arguments.rounds
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        first = Round(url, make=make, tally=Tally(), seed=999)
        for index in range(NUM_NAMES):
            version = await first._upload(client, f"p{index}", 9_000_000 + index)  # noqa: SLF001
            await client.put(f"/v1/prompts/p{index}/aliases/latest", json={"version": version})
    warm_up = Round(url, make=make, tally=Tally(), seed=998)
    await warm_up.run(arguments.streams, 4, arguments.pause, with_changes=True)
    for number in range(arguments.rounds):
        order: Sequence[str] = ("alone", "with changes") if number % 2 else ("with changes", "alone")
        for kind in order:
            tally, before = tallies[kind], len(tallies[kind].gaps)
            load = Round(url, make=make, tally=tally, seed=number)
            await load.run(arguments.streams, per_round, arguments.pause, with_changes=kind == "with changes")
            tally.rounds.append(percentile(tally.gaps[before:], 0.99))
            print(f"round {number} {kind}: p99 {tally.rounds[-1]:.1f} ms", flush=True)
    return tallies


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["soft_prompt", "adapter"], default="soft_prompt")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--changes", type=int, default=400, help="total number of uploads and promotions")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.15, help="seconds before each change")
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_served_model(folder, layers=arguments.layers)
        with serving(model, folder / "store", "--kv-cache-memory", "1GiB") as url:
            make: MakeFiles = partial(soft_prompt_files, layers=arguments.layers)
            if arguments.kind == "adapter":
                make = partial(adapter_files, model)
            tallies = asyncio.run(measure(url, arguments, make))
    alone, changed = tallies["alone"], tallies["with changes"]
    figures = {
        "kind": arguments.kind,
        "streams_at_once": arguments.streams,
        "uploads_and_promotions": changed.num_changes,
        **{
            kind: {
                "streams": tally.num_streams,
                "failures": tally.failures[:5],
                "tokens_per_second": round(tally.num_tokens / tally.seconds, 1),
                "median_gap_ms": round(1000 * statistics.median(tally.gaps), 1),
                "p99_gap_ms": round(percentile(tally.gaps, 0.99), 1),
                "p99_gap_ms_by_round": [round(value, 1) for value in tally.rounds],
            }
            for kind, tally in tallies.items()
        },
        "p99_with_changes_over_alone": round(percentile(changed.gaps, 0.99) / percentile(alone.gaps, 0.99), 2),
        "median_of_the_rounds": round(
            statistics.median(a / b for a, b in zip(changed.rounds, alone.rounds, strict=True)), 2
        ),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
