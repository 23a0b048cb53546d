"""A server under more load than it can carry: what still comes in time, and what is refused.

    python -m benchmarks.overload --plot benchmarks/overload.png

The embedded model answers completions of 64 to 192 tokens over its four soft prompts. First it is measured what it
carries when each of 64 clients asks again as soon as it has its answer. Then requests arrive at random (Poisson, and
nobody waits for anybody: an open loop) at 0.5, 1, 2 and 4 times that rate. Goodput is answers a second that come in
time.

Lengths differ because equal ones keep in step: sequences that have begun together end together, and whether one such
wave of 64 falls into the time that counts or not is worth several answers a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks.server import serving
from benchmarks.ways import machine
from server.demo.tour import HELDOUT_DIRECTORY, MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.support.processes import engine_of, metric

TASKS = ("sentiment", "intent", "extract", "dates")
NEW_TOKENS = (64, 192)
CLIENTS = 64
FACTORS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Work:
    """What the server and its clients have done so far; the difference of two tells of the time between.

    Attributes:
        at: When this was read, in seconds.
        num_tokens: Tokens that the engine has generated.
        num_steps: Its steps.
        num_in_steps: Sequences in them, summed.
        cpu_seconds: CPU time of the engine's process, of the API's, and of the clients'.
    """

    at: float
    num_tokens: float
    num_steps: float
    num_in_steps: float
    cpu_seconds: tuple[float, ...]

    @classmethod
    def now(cls, url: str) -> Work:
        """Read the metrics and the processes' times."""
        text = httpx.get(f"{url}/metrics").text
        names = ("generation_tokens_total", "engine_steps_total", "batch_size_sum")
        num_tokens, num_steps, num_in_steps = [metric(text, f"prelude_{name}") for name in names]
        here = psutil.Process()
        engine = engine_of(here)
        api = psutil.Process(engine.ppid())
        times = [process.cpu_times() for process in (engine, api, here)]
        cpu = tuple(item.user + item.system for item in times)
        return cls(time.monotonic(), num_tokens, num_steps, num_in_steps, cpu)

    def since(self, before: Work) -> Work:
        """What was done between."""
        return Work(
            self.at - before.at,
            self.num_tokens - before.num_tokens,
            self.num_steps - before.num_steps,
            self.num_in_steps - before.num_in_steps,
            tuple(now - then for now, then in zip(self.cpu_seconds, before.cpu_seconds, strict=True)),
        )


@dataclass
class Outcome:
    """What came of the requests of one rate.

    Attributes:
        offered: Requests a second.
        seconds: How long they arrived.
        answers: Of each answered request: seconds from the beginning until its answer came, and its latency.
        codes: How many had which status.
        num_without_retry: Refusals that did not say when to try again.
        work: What the processes did in the time that counts.
    """

    offered: float
    seconds: float
    answers: list[tuple[float, float]] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    num_without_retry: int = 0
    work: Work | None = None

    def goodput(self, limit: float) -> float:
        """Answers a second within the limit that came while requests did, the first quarter of the time aside."""
        began = self.seconds / 4
        within = sum(began <= at <= self.seconds and latency <= limit for at, latency in self.answers)
        return within / (self.seconds - began)

    def quantile(self, share: float) -> float:
        """A quantile of the answered requests' latencies."""
        found = sorted(latency for _, latency in self.answers)
        return found[min(len(found) - 1, int(share * len(found)))] if found else 0.0


class Client:
    """Asks with as little of its own work as can be: a connection for each request, and no parsing of the answer."""

    def __init__(self, url: str, seed: int) -> None:
        address = urlsplit(url)
        self.url = url
        self._host, self._port = address.hostname, address.port
        self._rng = random.Random(seed)
        lines = {task: (HELDOUT_DIRECTORY / f"{task}.jsonl").read_text().splitlines() for task in TASKS}
        self._requests = [
            self._encode(task, json.loads(line)["input"]) for task in TASKS for line in lines[task][:50]
        ]

    def _encode(self, task: str, text: str) -> bytes:
        length = self._rng.randint(*NEW_TOKENS)
        body = {"model": task, "prompt": text, "max_tokens": length, "ignore_eos": True, "temperature": 0}
        encoded = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\nConnection: close\r\n"
        return f"{head}Content-Length: {len(encoded)}\r\n\r\n".encode() + encoded

    async def ask(self) -> tuple[int, bool]:
        """Status of one request's answer, and whether it says when to try again."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._rng.choice(self._requests))
            answer = await reader.read(-1)
        finally:
            writer.close()
        return int(answer[9:12]), b"retry-after:" in answer.partition(b"\r\n\r\n")[0].lower()


async def carried(client: Client, seconds: float) -> float:
    """Requests a second of clients that ask again as soon as they are answered."""
    count, began = 0, time.monotonic()

    async def work() -> None:
        nonlocal count
        while time.monotonic() - began < seconds:
            status, _ = await client.ask()
            if status != 200:
                raise RuntimeError(f"a request was answered with {status}")
            count += 1

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return count / (time.monotonic() - began)


async def offer(client: Client, rate: float, seconds: float, seed: int) -> Outcome:
    """Let requests arrive at a rate, and wait for what comes of them."""
    outcome, rng = Outcome(rate, seconds), random.Random(seed)
    tasks: list[asyncio.Task[None]] = []

    async def one(due: float) -> None:
        status, has_retry = await client.ask()
        outcome.codes[status] += 1
        if status == 200:
            now = time.monotonic()
            outcome.answers.append((now - began, now - due))
        else:
            outcome.num_without_retry += not has_retry

    async def watch() -> None:
        await asyncio.sleep(seconds / 4)
        before = await asyncio.to_thread(Work.now, client.url)
        await asyncio.sleep(began + seconds - time.monotonic())
        outcome.work = (await asyncio.to_thread(Work.now, client.url)).since(before)

    began = due = time.monotonic()
    tasks.append(asyncio.create_task(watch()))
    while (due := due + rng.expovariate(rate)) - began < seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    return outcome


def measure(flags: Sequence[str], seconds: float, capacity: float | None) -> tuple[float, list[Outcome]]:
    """What a server with these flags carries, and what becomes of each rate."""
    with tempfile.TemporaryDirectory() as folder:
        every = ("--dtype", "float32", "--allow-other-base", "--kv-cache-memory", "256MiB")
        with serving(MODEL_DIRECTORY, Path(folder) / "store", *every, *flags) as url:
            for task in TASKS:
                names = ("adapter_config.json", "adapter_model.safetensors")
                files = [("files", (name, (SOFT_PROMPTS_DIRECTORY / task / name).read_bytes())) for name in names]
                httpx.post(f"{url}/v1/prompts", data={"id": task}, files=files).raise_for_status()
            client = Client(url, seed=1)
            asyncio.run(carried(client, 3))
            capacity = capacity or asyncio.run(carried(client, seconds))
            outcomes = [
                asyncio.run(offer(client, factor * capacity, seconds, seed)) for seed, factor in enumerate(FACTORS)
            ]
    return capacity, outcomes


def show(name: str, capacity: float, outcomes: Sequence[Outcome], limit: float) -> None:
    """Print one server's table."""
    peak = max(outcome.goodput(limit) for outcome in outcomes)
    print(f"\n{name}\n| offered | answered | refused | goodput/s | of its peak | p50 s | p95 s | p99 s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for outcome in outcomes:
        refused = {code: count for code, count in sorted(outcome.codes.items()) if code != 200}
        cells = [
            f"{outcome.offered / capacity:.1f} x ({outcome.offered:.1f}/s)",
            outcome.codes[200],
            ", ".join(f"{count} x {code}" for code, count in refused.items()) or "0",
            f"{outcome.goodput(limit):.1f}",
            f"{outcome.goodput(limit) / peak:.2f}",
            *(f"{outcome.quantile(share):.2f}" for share in (0.5, 0.95, 0.99)),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
    print("| offered | tokens/s | in a step | ms a step | engine, API, clients: of a core |")
    print("| --- | --- | --- | --- | --- |")
    for outcome in outcomes:
        if (work := outcome.work) is not None:
            shares = ", ".join(f"{seconds / work.at:.2f}" for seconds in work.cpu_seconds)
            rate, size = work.num_tokens / work.at, work.num_in_steps / work.num_steps
            step = 1000 * work.at / work.num_steps
            print(f"| {outcome.offered / capacity:.1f} x | {rate:,.0f} | {size:.1f} | {step:.2f} | {shares} |")
    print(f"refusals without Retry-After: {sum(outcome.num_without_retry for outcome in outcomes)}")


def plot(path: Path, capacity: float, runs: dict[str, list[Outcome]], limit: float) -> None:
    """Goodput and latency over what was offered."""
    import matplotlib  # noqa: PLC0415 - needed for the picture alone

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, outcomes in runs.items():
        offered = [outcome.offered / capacity for outcome in outcomes]
        left.plot(offered, [outcome.goodput(limit) for outcome in outcomes], "o-", label=name)
        (line,) = right.plot(offered, [outcome.quantile(0.95) for outcome in outcomes], "o-", label=f"p95, {name}")
        median = [outcome.quantile(0.5) for outcome in outcomes]
        right.plot(offered, median, "o--", color=line.get_color(), label=f"p50, {name}")
    left.axhline(capacity, color="grey", linewidth=0.8, linestyle=":")
    right.axhline(limit, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="offered, of what is carried", ylabel=f"answers a second within {limit:g} s", ylim=0)
    right.set(xlabel="offered, of what is carried", ylabel="seconds to the answer", ylim=0)
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure a server with a limit on waiting, and one without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each rate is offered")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds within which an answer counts")
    parser.add_argument("--wait", type=float, default=2.0, help="--max-wait-seconds of the server with a limit")
    parser.add_argument("--num-threads", default="1", help="the model's; one leaves a core of two to the rest")
    parser.add_argument("--bounded-only", action="store_true", help="leave the server without a limit out")
    parser.add_argument("--plot", type=Path)
    values = parser.parse_args()
    print(machine())
    flags = ("--max-num-seqs", "64", "--num-threads", values.num_threads)
    capacity, bounded = measure((*flags, "--max-wait-seconds", str(values.wait)), values.seconds, None)
    print(f"carried by {CLIENTS} clients: {capacity:.1f} requests/s of {NEW_TOKENS[0]} to {NEW_TOKENS[1]} tokens")
    runs = {f"--max-wait-seconds {values.wait:g}": bounded}
    if not values.bounded_only:
        _, runs["no limit on waiting"] = measure(flags, values.seconds, capacity)
    for name, outcomes in runs.items():
        show(name, capacity, outcomes, values.limit)
    if values.plot is not None:
        plot(values.plot, capacity, runs, values.limit)


if __name__ == "__main__":
    main()
