"""A minimal load generator, which ``benchmarks.bulk`` compares with ``prelude run``.

    python -m benchmarks.bulk_load ROWS.jsonl URL complete|classify CONCURRENCY ROWS_PER_REQUEST

Sends all rows from memory through one httpx client, with the same number of requests in flight as ``prelude run``,
and discards the answers. Prints rows per second. It is a separate module so that its process imports little.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import httpx

LABELS = ["\npositive", "\nnegative"]


async def load(texts: list[str], url: str, kind: str, concurrency: int, size: int) -> float:
    """Send all texts; returns rows per second."""
    batches = iter([texts[start : start + size] for start in range(0, len(texts), size)])
    weight = len(LABELS) if kind == "classify" else 1
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def work() -> None:
            for batch in batches:
                body = {"model": "sentiment", "temperature": 0}
                if kind == "classify":
                    response = await client.post("/v1/classify", json={**body, "input": batch, "labels": LABELS})
                else:
                    response = await client.post("/v1/completions", json={**body, "prompt": batch, "max_tokens": 2})
                response.raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency // (size * weight))))
        return len(texts) / (time.perf_counter() - started)


if __name__ == "__main__":
    source, base_url, task, in_flight, per_request = sys.argv[1:]
    rows = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()]
    print(asyncio.run(load(rows, base_url, task, int(in_flight), int(per_request))))
