"""Run mixed traffic on a whole server for minutes, and check for memory growth and leaks.

    python -m scripts.soak_server --minutes 20

Threads ask questions with known answers, upload, promote, roll back, warm and delete soft prompts, and open streams
that they close at random moments. The script samples the memory of the API process and of the engine process every
two seconds, and compares the last quarter of the time with the first.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import load, save

from scripts.faults.harness import TASKS, Baseline, Load, Report, Server, check_end, main, serve
from tests.support.serving import adapter, upload

NUM_NAMES = 20
SAMPLE_SECONDS = 2.0
MAX_GROWTH_RATIO = 1.1
NUM_PARTS = 10


class Churn:
    """Changes soft prompts in every way that the API offers, and counts the answers."""

    def __init__(self, url: str, ends: threading.Event, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._ends = ends
        self._client = httpx.Client(base_url=url, timeout=60)
        self._config, weights = adapter("sentiment")
        self._rows = load(weights)["prompt_embeddings"]
        self._seed = seed

    def run(self) -> None:
        """Send random changes until ``ends`` is set."""
        with self._client:
            while not self._ends.is_set():
                what = self._rng.choice(["upload"] * 4 + ["ask"] * 4 + ["promote", "rollback", "warm", "delete"])
                response = self._do(what, f"soak-{self._seed}-{self._rng.randrange(NUM_NAMES)}")
                self.counts[f"{what} {response.status_code}"] += 1
                time.sleep(self._rng.uniform(0, 0.1))

    def _do(self, what: str, name: str) -> httpx.Response:
        client, path = self._client, f"/v1/prompts/{name}"
        match what:
            case "upload":
                rows = self._rows + np.float32(self._rng.randrange(10**6) / 1e7)
                return upload(client, name, self._config, save({"prompt_embeddings": rows}))
            case "ask":
                return client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 8})
            case "promote":
                return client.put(f"{path}/aliases/prod", json={"version": self._rng.randint(1, 3)})
            case "rollback":
                return client.post(f"{path}/aliases/latest/rollback", json={})
            case "warm":
                return client.post(f"{path}/warm")
            case _:
                return client.delete(path, params={"force": "true"})


def disconnect(url: str, ends: threading.Event, seed: int, counts: Counter[str]) -> None:
    """Open streams, read some events of each, and disconnect, until ``ends`` is set."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60) as client:
        while not ends.is_set():
            body = {"model": rng.choice(TASKS), "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                for _ in range(rng.randrange(60)):
                    next(lines, None)
            counts["closed streams"] += 1
            time.sleep(rng.uniform(0, 0.2))


def sample(server: Server, ends: threading.Event, found: dict[str, list[int]]) -> None:
    """Append the memory of both processes to ``found``, in bytes, until ``ends`` is set."""
    engine = server.engine
    while not ends.wait(SAMPLE_SECONDS):
        found["API process"].append(server.process.memory_info().rss)
        found["engine process"].append(engine.memory_info().rss)


def run(folder: Path, *, minutes: float) -> Report:
    """Run all traffic for ``minutes``."""
    report, ends = Report(), threading.Event()
    found: dict[str, list[int]] = {"API process": [], "engine process": []}
    closed: Counter[str] = Counter()
    with serve(folder, "--soft-prompt-host-memory", "4MiB") as server:
        load = Load(server, num_threads=4)
        before = Baseline.of(server)
        churns = [Churn(server.url, ends, seed) for seed in range(2)]
        threads = [threading.Thread(target=churn.run) for churn in churns]
        threads += [threading.Thread(target=disconnect, args=(server.url, ends, seed, closed)) for seed in range(2)]
        threads.append(threading.Thread(target=sample, args=(server, ends, found)))
        with load:
            for thread in threads:
                thread.start()
            time.sleep(minutes * 60)
            ends.set()
            for thread in threads:
                thread.join()
        report.figure("minutes", minutes)
        for process, sizes in found.items():
            quarter = max(1, len(sizes) // 4)
            first, last = (statistics.median(part) / 2**20 for part in (sizes[:quarter], sizes[-quarter:]))
            report.check(
                f"memory of the {process}, MiB: first quarter, last",
                f"{first:.1f} -> {last:.1f}",
                holds=last <= first * MAX_GROWTH_RATIO,
            )
            step = max(1, len(sizes) // NUM_PARTS)
            parts = [statistics.median(sizes[start : start + step]) / 2**20 for start in range(0, len(sizes), step)]
            report.figure(f"memory of the {process} by tenths, MiB", " ".join(f"{part:.0f}" for part in parts))
        load.report(report)
        report.figure("streams that clients closed", closed["closed streams"])
        changes = sum((churn.counts for churn in churns), Counter[str]())
        report.figure("changes, by answer", ", ".join(f"{what}: {n}" for what, n in sorted(changes.items())))
        failed = {what: n for what, n in changes.items() if int(what.split()[1]) >= 500}
        report.check("changes that failed in the server", failed or 0, holds=not failed)
        failed_requests = sum(load.counts.values()) - load.counts["right"] - load.counts["wrong"]
        report.check("questions that failed", failed_requests, holds=failed_requests == 0)
        check_end(report, server, load, before)
    return report


if __name__ == "__main__":
    main(run, __doc__ or "", minutes=20.0)
