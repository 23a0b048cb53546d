"""Shared parts of the fault scripts: load with known answers, recorded uploads, a failing proxy, a results table."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load, save

from server.demo.tour import HELDOUT_DIRECTORY
from tests.support.processes import engine_of, metric
from tests.support.serving import adapter, serving, upload
from tests.support.waiting import seconds_until

TASKS = ("sentiment", "intent", "extract", "dates")
FLAGS = ("--dtype", "float32", "--num-threads", "1", "--log-level", "WARNING", "--retention-days", "0")
SETTLE_SECONDS = 20.0
MAX_GROWTH_BYTES = 150 * 2**20


@dataclass
class Report:
    """The results of a run: figures, and whether each invariant held."""

    rows: list[tuple[str, str, bool | None]] = field(default_factory=list)

    def figure(self, name: str, value: object) -> None:
        """Add a figure."""
        self.rows.append((name, str(value), None))

    def check(self, name: str, value: object, *, holds: bool) -> None:
        """Add an invariant, the value found, and whether the invariant holds."""
        self.rows.append((name, str(value), holds))

    @property
    def broken(self) -> list[str]:
        """The invariants that did not hold."""
        return [f"{name}: {value}" for name, value, holds in self.rows if holds is False]

    def show(self, title: str) -> None:
        """Print the table."""
        table = Table(title=title, title_justify="left")
        for column in ("", "found", "holds"):
            table.add_column(column)
        for name, value, holds in self.rows:
            table.add_row(name, value, "" if holds is None else "yes" if holds else "NO")
        Console(width=110).print(table)


class Server:
    """A running server with the embedded soft prompts, observed through HTTP and its processes."""

    def __init__(self, client: httpx.Client, pid: int, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.process = psutil.Process(pid)
        self.url = str(client.base_url)

    @property
    def engine(self) -> psutil.Process:
        """The current engine process."""
        return engine_of(self.process)

    def value(self, name: str) -> float:
        """The value of a metric; ``name`` includes the labels, but not the prefix ``prelude_``."""
        return metric(self.client.get("/metrics").raise_for_status().text, f"prelude_{name}")

    def is_ready(self) -> bool:
        """Whether the server accepts requests."""
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def is_settled(self) -> bool:
        """Whether no sequence runs or waits, and no block is in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
        return all(self.value(name) == 0 for name in names)


@contextmanager
def serve(folder: Path, *flags: str, **options: object) -> Iterator[Server]:
    """Run a server with the soft prompts of ``TASKS`` until the block ends."""
    with serving(folder, *FLAGS, *flags, **options) as (client, process):  # type: ignore[arg-type]
        upload_tasks(client)
        yield Server(client, process.pid, folder)


def upload_tasks(client: httpx.Client) -> None:
    """Upload the soft prompts of ``TASKS``; existing ones stay unchanged."""
    for task in TASKS:
        upload(client, task, *adapter(task)).raise_for_status()


class Load:
    """Threads that ask questions with known answers, and count the outcomes."""

    def __init__(self, server: Server, *, num_threads: int = 8, tasks: tuple[str, ...] = TASKS) -> None:
        self.counts: Counter[str] = Counter()
        self._url = server.url
        self._questions = [
            (task, json.loads(line)["input"])
            for task in tasks
            for line in (HELDOUT_DIRECTORY / f"{task}.jsonl").read_text().splitlines()[:6]
        ]
        self._reference = {question: self._ask(server.client, question)[1] for question in self._questions}
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(num_threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def ask_each(self, client: httpx.Client) -> bool:
        """Whether every question gets its known answer."""
        return all(self._ask(client, question) == ("right", text) for question, text in self._reference.items())

    def _ask(self, client: httpx.Client, question: tuple[str, str]) -> tuple[str, str]:
        model, text = question
        body = {"model": model, "prompt": text, "temperature": 0, "max_tokens": 24}
        try:
            response = client.post("/v1/completions", json=body)
            reply = response.json()
        except (httpx.TransportError, ValueError) as error:
            return type(error).__name__, ""
        return ("right", reply["choices"][0]["text"]) if response.is_success else (reply["error"]["code"], "")

    def _work(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._ends.is_set():
                question = rng.choice(self._questions)
                outcome, text = self._ask(client, question)
                if outcome == "right" and text != self._reference[question]:
                    outcome = "wrong"
                self.counts[outcome] += 1
                if outcome != "right":
                    time.sleep(0.05)

    def report(self, report: Report) -> None:
        """Add the counts to the report."""
        report.figure("requests answered", self.counts["right"])
        errors = {code: count for code, count in sorted(self.counts.items()) if code not in ("right", "wrong")}
        report.figure("requests refused or failed", ", ".join(f"{code} {n}" for code, n in errors.items()) or 0)
        report.check("wrong answers", self.counts["wrong"], holds=self.counts["wrong"] == 0)


class Uploads:
    """Uploads distinct soft prompts, and records which were acknowledged."""

    def __init__(self, client: httpx.Client) -> None:
        self.acknowledged: dict[str, bytes] = {}
        self.refused: Counter[str] = Counter()
        self._versions: dict[str, int] = {}
        self._client = client
        self._numbers = itertools.count()
        self._config, weights = adapter("sentiment")
        self._rows = load(weights)["prompt_embeddings"]

    def one(self) -> bool:
        """Upload one soft prompt; returns whether it was acknowledged."""
        number = next(self._numbers)
        name, weights = f"upload-{number}", save({"prompt_embeddings": self._rows + np.float32(number / 1000)})
        try:
            response = upload(self._client, name, self._config, weights)
        except httpx.TransportError as error:
            self.refused[type(error).__name__] += 1
            return False
        if response.is_success:
            self.acknowledged[name] = weights
            self._versions[name] = response.json()["version"]
            return True
        self.refused[f"{response.status_code} {response.json()['error']['code']}"] += 1
        return False

    def report(self, report: Report) -> None:
        """Add to the report whether every acknowledged upload is stored with the right bytes."""
        report.figure("uploads acknowledged", len(self.acknowledged))
        report.figure("uploads refused", ", ".join(f"{code}: {n}" for code, n in sorted(self.refused.items())) or 0)
        lost = []
        for name, weights in self.acknowledged.items():
            version = self._versions[name]
            url = f"/v1/prompts/{name}/versions/{version}/files/adapter_model.safetensors"
            if self._client.get(url).content != weights:
                lost.append(name)
        report.check("acknowledged uploads lost", lost or 0, holds=not lost)


class Proxy:
    """A TCP proxy on loopback that can close connections, refuse new ones, and delay data."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self._target = port
        self._is_cut = False
        self._live: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close open connections, and refuse new ones."""
        self._is_cut = True
        for connection in list(self._live):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Accept connections again."""
        self._is_cut = False

    def close(self) -> None:
        """Close all connections, and stop listening."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, inside: socket.socket) -> None:
        with inside, suppress(OSError):
            if self._is_cut:
                return
            with socket.create_connection(("127.0.0.1", self._target)) as outside:
                pair = {inside, outside}
                self._live |= pair
                back = threading.Thread(target=self._pump, args=(outside, inside), daemon=True)
                back.start()
                self._pump(inside, outside, is_delayed=True)
                back.join()
                self._live -= pair

    def _pump(self, source: socket.socket, target: socket.socket, *, is_delayed: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_delayed and self.delay:
                    time.sleep(self.delay)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Baseline:
    """The resources of the API process before the fault: open files, and memory in bytes."""

    num_files: int
    num_bytes: int

    @classmethod
    def of(cls, server: Server) -> Baseline:
        """Read the current values."""
        return cls(server.process.num_fds(), server.process.memory_info().rss)


def check_end(report: Report, server: Server, load: Load, before: Baseline, *, collects: bool = True) -> None:
    """Check the invariants after a fault: answers are unchanged, and all resources are released.

    Args:
        report: Receives the findings.
        server: The server.
        load: Knows the right answers.
        before: The server's resources before the fault.
        collects: Whether the store deletes unreferenced files at once. With a shared catalog it does not, because
            another server may be uploading them.
    """
    seconds = seconds_until(server.is_ready, 60)
    report.check("time until ready without help, s", f"{seconds:.1f}", holds=seconds < SETTLE_SECONDS)
    report.check("answers equal to those before the fault", "all", holds=load.ask_each(server.client))
    seconds = seconds_until(server.is_settled, SETTLE_SECONDS)
    report.check("sequences and blocks in use at the end", 0, holds=seconds < SETTLE_SECONDS)
    seconds_until(lambda: server.process.num_fds() <= before.num_files + 8, SETTLE_SECONDS)
    num_files = server.process.num_fds()
    report.check(
        "open files of the API process", f"{before.num_files} -> {num_files}", holds=num_files <= before.num_files + 8
    )
    num_bytes = server.process.memory_info().rss
    mebibytes = f"{before.num_bytes >> 20} -> {num_bytes >> 20}"
    report.check("memory of the API process, MiB", mebibytes, holds=num_bytes < before.num_bytes + MAX_GROWTH_BYTES)
    while names := [item["id"] for item in server.client.get("/v1/prompts").json()["data"]]:
        for name in names:
            server.client.delete(f"/v1/prompts/{name}", params={"force": "true"}).raise_for_status()
    blobs = server.folder / "store" / "blobs"
    if collects and blobs.is_dir():  # with an object store there is no such folder
        seconds_until(lambda: not _files(blobs), SETTLE_SECONDS)
        left = len(_files(blobs))
        report.check("files left after all prompts are deleted (a leaked lease keeps one)", left, holds=left == 0)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def main(run: Callable[..., Report], description: str, **options: int | float) -> None:
    """Run a script with its options as flags, and print its table; exit status 1 if an invariant is broken."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    values = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="prelude-fault-") as folder:
        report = run(Path(folder), **values)
    report.show(description.splitlines()[0])
    raise SystemExit(1 if report.broken else 0)
