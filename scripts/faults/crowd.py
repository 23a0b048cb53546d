"""A thousand concurrent streams, beside clients that connect and send nothing.

python -m scripts.faults.crowd --streams 1000 --silent 500
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from contextlib import ExitStack
from pathlib import Path
from socket import create_connection

import httpx

from scripts.faults.harness import TASKS, Baseline, Load, Report, Server, check_end, main, serve

MAX_TOKENS = 32


async def crowd(server: Server, count: int) -> list[str]:
    """Run ``count`` concurrent streams, some with a soft prompt; returns their texts."""

    async def one(http: httpx.AsyncClient, number: int) -> str:
        body = question(number) | {"stream": True}
        text = ""
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    payload = json.loads(line.removeprefix("data: "))
                    text += payload["choices"][0]["text"] if "choices" in payload else payload["error"]["code"]
        return text

    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        return await asyncio.gather(*(one(http, number) for number in range(count)))


def question(number: int) -> dict[str, object]:
    """One of ten questions."""
    models = [*TASKS, "prelude-demo"]
    return {
        "model": models[number % 5],
        "prompt": f"Order {number % 10} from Mia",
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
    }


def run(folder: Path, *, streams: int, silent: int) -> Report:
    """Stream to ``streams`` clients while ``silent`` other connections send nothing."""
    report = Report()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    with serve(folder, "--max-waiting", "2000", "--head-timeout", "5") as server, ExitStack() as stack:
        reference = [
            server.client.post("/v1/completions", json=question(number)).json()["choices"][0]["text"]
            for number in range(10)
        ]
        load = Load(server, num_threads=0)
        before = Baseline.of(server)
        address = (server.client.base_url.host, server.client.base_url.port)
        for _ in range(silent):
            stack.enter_context(create_connection(address))
        began = time.monotonic()
        texts = asyncio.run(crowd(server, streams))
        seconds = time.monotonic() - began
        report.figure("concurrent streams, silent clients", f"{streams}, {silent}")
        report.figure("all ended after, s", f"{seconds:.1f}")
        report.figure("tokens per second", f"{streams * MAX_TOKENS / seconds:.0f}")
        wrong = sum(text != reference[number % 10] for number, text in enumerate(texts))
        report.check("streams whose text differs from the text alone", wrong, holds=wrong == 0)
        stack.close()
        check_end(report, server, load, before)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", streams=1000, silent=500)
