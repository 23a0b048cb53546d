"""Compare streaming over HTTP to 64 clients with the engine alone.

    python -m benchmarks.streaming

Each of 64 clients streams completions of 64 tokens over HTTP, one after the other, over 16 soft prompts. Then the
same number of coroutines send the same requests to an engine process through its asyncio client, without HTTP, JSON
or text. Servers and clients share the same cores. The two ways alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.server import build_served_model, serving, soft_prompt_files
from benchmarks.ways import default_dtype, machine
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE
from server.config import EngineSettings
from server.engine.process.async_engine import AsyncEngine
from server.engine.types import GenerateRequest, SamplingParams, SoftPromptSource

NUM_PROMPTS = 16
NEW_TOKENS = 64


def make_requests(clients: int, each: int, seed: int) -> list[list[tuple[int, list[int]]]]:
    """The requests of each client, as (index of the soft prompt, token ids)."""
    rng = random.Random(seed)
    return [
        [
            (rng.randrange(NUM_PROMPTS), [rng.randrange(1, 2000) for _ in range(rng.randint(32, 128))])
            for _ in range(each)
        ]
        for _ in range(clients)
    ]


async def over_http(url: str, plan: list[list[tuple[int, list[int]]]]) -> float:
    """Tokens per second of all streams over HTTP."""

    async def client(http: httpx.AsyncClient, requests: list[tuple[int, list[int]]]) -> int:
        count = 0
        for prompt, token_ids in requests:
            body = {"model": f"p{prompt}", "prompt": token_ids, "max_tokens": NEW_TOKENS, "ignore_eos": True}
            body |= {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                last = ""
                async for line in response.aiter_lines():
                    last = line if line.startswith("data: {") else last
                count += json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]
        return count

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        started = time.perf_counter()
        counts = await asyncio.gather(*(client(http, requests) for requests in plan))
        return sum(counts) / (time.perf_counter() - started)


async def over_engine(
    engine: AsyncEngine, plan: list[list[tuple[int, list[int]]]], sources: list[SoftPromptSource]
) -> float:
    """Tokens per second of all requests to the engine process."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)

    async def client(name: str, requests: list[tuple[int, list[int]]]) -> int:
        count = 0
        for number, (prompt, token_ids) in enumerate(requests):
            request = GenerateRequest(
                request_id=f"{name}-{number}", prompt_token_ids=token_ids, params=params, soft_prompt=sources[prompt]
            )
            async for event in engine.generate(request):
                count += len(event.token_ids)
        return count

    started = time.perf_counter()
    counts = await asyncio.gather(*(client(str(index), requests) for index, requests in enumerate(plan)))
    return sum(counts) / (time.perf_counter() - started)


async def upload(url: str, layers: int, folder: Path) -> list[SoftPromptSource]:
    """Upload the soft prompts to the server; returns them as sources for the engine."""
    sources = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for index in range(NUM_PROMPTS):
            config, weights = soft_prompt_files(index, layers=layers)
            files = [("files", (CONFIG_FILE, config)), ("files", (WEIGHTS_FILE, weights))]
            (await http.post("/v1/prompts", data={"id": f"p{index}"}, files=files)).raise_for_status()
            path = folder / f"p{index}.safetensors"
            path.write_bytes(weights)
            sources.append(
                SoftPromptSource(digest=path.stem, num_virtual_tokens=20, is_key_values=False, path=str(path))
            )
    return sources


async def measure(url: str, model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Measure both ways in turn, after one warm-up; returns tokens per second."""
    sources = await upload(url, arguments.layers, folder)
    engine = AsyncEngine(
        EngineSettings(
            model=str(model), dtype=arguments.dtype, enable_prefix_caching=False, kv_cache_memory=2 * 2**30
        )
    )
    await engine.start()
    speeds: dict[str, list[float]] = {"http": [], "engine": []}
    try:
        for number in range(arguments.rounds + 1):
            plan = make_requests(arguments.clients, arguments.each, number)
            for name, speed in (
                ("http", await over_http(url, plan)),
                ("engine", await over_engine(engine, plan, sources)),
            ):
                print(f"round {number}  {name:7s} {speed:8.1f} tokens/s", flush=True)
                if number:
                    speeds[name].append(speed)
    finally:
        await engine.stop()
    return speeds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=2, help="requests per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default=default_dtype())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_served_model(folder, layers=arguments.layers)
        flags = ["--kv-cache-memory", "2GiB", "--dtype", arguments.dtype, "--no-enable-prefix-caching"]
        with serving(model, folder / "store", *flags) as url:
            speeds = asyncio.run(measure(url, model, arguments, folder))
    ratios = [a / b for a, b in zip(speeds["http"], speeds["engine"], strict=True)]
    figures = {
        "machine": f"{machine()}, {arguments.dtype}",
        "tokens_per_second": {key: round(statistics.median(values), 1) for key, values in speeds.items()},
        "http_over_engine": round(statistics.median(ratios), 3),
        "by_round": [round(value, 3) for value in ratios],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
