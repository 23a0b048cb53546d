"""What it costs to look: a mixed batch of 64 over HTTP with the console's Live page open, and with none.

    python -m benchmarks.watching

64 clients send completions of 64 tokens over 16 soft prompts to a server with a model of 135M shape. In every second
round, one subscriber reads the events that the page Live reads (``live``, ``stats`` and ``catalog``; the browser
itself would run elsewhere). The figure is the median of the ratios of neighbouring rounds. In the last rounds, 64
subscribers read, one of which never takes anything off its connection. The resident memory of the server process is
reported before, after the rounds of one subscriber, and while the 64 are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import psutil

from benchmarks.server import build_served_model, serving, soft_prompt_files
from benchmarks.streaming import NUM_PROMPTS, make_requests
from benchmarks.ways import default_dtype, machine
from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE

CLIENTS, NEW_TOKENS = 64, 64
SUBSCRIBERS = 64
_TOPICS = "/v1/events?topics=live,stats,catalog"


async def speed(http: httpx.AsyncClient, plan: list[list[tuple[int, list[int]]]]) -> float:
    """Tokens per second of all requests, sent at once by their clients."""

    async def client(requests: list[tuple[int, list[int]]]) -> int:
        count = 0
        for prompt, token_ids in requests:
            body = {"model": f"p{prompt}", "prompt": token_ids, "max_tokens": NEW_TOKENS, "ignore_eos": True}
            response = await http.post("/v1/completions", json=body | {"temperature": 0})
            response.raise_for_status()
            count += response.json()["usage"]["completion_tokens"]
        return count

    started = time.perf_counter()
    counts = await asyncio.gather(*map(client, plan))
    return sum(counts) / (time.perf_counter() - started)


@asynccontextmanager
async def subscribed(http: httpx.AsyncClient, count: int, *, idle: int = 0) -> AsyncIterator[list[int]]:
    """Subscribers while the block runs, of which some never read; yields the number of events of each reader."""
    events = [0] * (count - idle)

    async def read(index: int) -> None:
        async with http.stream("GET", _TOPICS, timeout=None) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                events[index] += line.startswith("event: live")

    async with AsyncExitStack() as stack:
        for _ in range(idle):
            await stack.enter_async_context(http.stream("GET", _TOPICS, timeout=None))
        readers = [asyncio.create_task(read(index)) for index in range(len(events))]
        await asyncio.sleep(1)
        try:
            yield events
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)


async def compare(url: str, server: psutil.Process, rounds: int) -> dict[str, object]:
    """Rounds with and without subscribers, in turn."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    plan = make_requests(CLIENTS, 1, seed=1)
    ratios, many_ratios, paces, memory = [], [], [], [server.memory_info().rss]
    speeds: dict[str, list[float]] = {"none": [], "one": [], "64": []}
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as http:
        for prompt in range(NUM_PROMPTS):
            files = zip((CONFIG_FILE, WEIGHTS_FILE), soft_prompt_files(prompt, layers=30), strict=True)
            parts = [("files", file) for file in files]
            (await http.post("/v1/prompts", data={"id": f"p{prompt}"}, files=parts)).raise_for_status()
        await speed(http, plan)
        for turn in range(rounds):
            found = {}
            for name in ("none", "one") if turn % 2 else ("one", "none"):
                async with subscribed(http, int(name == "one")):
                    found[name] = await speed(http, plan)
                speeds[name].append(found[name])
            ratios.append(found["one"] / found["none"])
        memory.append(server.memory_info().rss)
        for _ in range(2):
            started = time.perf_counter()
            async with subscribed(http, SUBSCRIBERS, idle=1) as events:
                many = await speed(http, plan)
                paces += [count / (time.perf_counter() - started) for count in events]
            speeds["64"].append(many)
            many_ratios.append(many / statistics.median(speeds["none"]))
            memory.append(server.memory_info().rss)
    return {
        "median_tokens_per_second": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
        "one_over_none": round(statistics.median(ratios), 4),
        "one_over_none_by_round": [round(ratio, 4) for ratio in ratios],
        "64_over_none": round(statistics.median(many_ratios), 4),
        "live_events_per_second_of_63": [round(min(paces), 2), round(statistics.median(paces), 2)],
        "resident_mib_of_the_server": [round(bytes_ / 2**20, 1) for bytes_ in memory],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", default=default_dtype())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_served_model(folder, layers=30)
        flags = ("--dtype", arguments.dtype, "--no-enable-prefix-caching", "--kv-cache-memory", "2GiB")
        with serving(model, folder / "store", *flags) as url:
            port = int(url.rpartition(":")[2])
            (server,) = [
                process
                for process in psutil.Process().children()
                if any(one.laddr.port == port for one in process.net_connections() if one.status == "LISTEN")
            ]
            figures = asyncio.run(compare(url, server, arguments.rounds))
    print(json.dumps({"machine": machine(), "dtype": arguments.dtype, **figures}, indent=2))


if __name__ == "__main__":
    main()
