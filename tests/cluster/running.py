"""A cluster on a Ray of its own, for tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.processes import PRELUDE
from tests.support.serving import BASE

MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make test-cluster installs it"),
]


@dataclass
class Cluster:
    """A cluster that ``prelude cluster`` runs.

    Attributes:
        client: Asks the ingress.
        folder: Its directory.
        config: Its file; a change takes effect with ``up``.
    """

    client: httpx.Client
    folder: Path
    config: dict[str, object]

    @contextmanager
    def up(self) -> Iterator[None]:
        """Run it until the block ends."""
        try:
            started = self.run("up")
            assert started.returncode == 0, started.stderr + logs(self.folder)
            yield
        finally:
            ended = self.run("down")
        assert ended.returncode == 0, ended.stderr

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        path = self.folder / "cluster.yaml"
        path.write_text(json.dumps(self.config))  # which is YAML, too
        return subprocess.run(
            [*PRELUDE, "cluster", command, "--config", str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def replicas(self, base: str = BASE) -> list[str]:
        """Names of the replicas of a base that the ingress knows."""
        bases = self.client.get("/v1/cluster").json()["bases"]
        (found,) = [one for one in bases if one["name"] == base]
        return [replica["name"] for replica in found["replicas"]]

    def server(self, name: str) -> psutil.Process:
        """The server process of a replica."""
        mark = str(self.folder / "prelude-cluster")
        found = [
            process
            for process in psutil.process_iter(["cmdline"])
            if name in (process.info["cmdline"] or ()) and any(mark in part for part in process.info["cmdline"])
        ]
        (server,) = found
        return server


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in folder.glob("prelude-cluster/logs/*"))


def ask(client: httpx.Client, model: str, replica: str | None = None) -> httpx.Response:
    body = {"model": model, "prompt": "Will it rain in Oslo on Monday?", "temperature": 0, "max_tokens": 8}
    return client.post(
        "/v1/completions", json=body, headers={} if replica is None else {"x-prelude-replica": replica}
    )


def text(response: httpx.Response) -> str:
    found: str = response.json()["choices"][0]["text"].strip()
    return found
