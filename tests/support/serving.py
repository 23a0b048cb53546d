"""Servers as users start them, for the tests that look from outside."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY

BASE = "prelude-demo"
PRELUDE = [sys.executable, "-c", "from server.cli import main; main()"]


def adapter(task: str) -> tuple[bytes, bytes]:
    """The embedded soft prompt's two files."""
    folder = SOFT_PROMPTS_DIRECTORY / task
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def upload(client: httpx.Client, name: str, config: bytes, weights: bytes, **fields: str) -> httpx.Response:
    """Upload two files as they are."""
    files = [("files", ("adapter_config.json", config)), ("files", ("adapter_model.safetensors", weights))]
    return client.post("/v1/prompts", data={"id": name, **fields}, files=files)


@contextmanager
def serving(
    folder: Path,
    *flags: str,
    model: Path = MODEL_DIRECTORY,
    store: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """``prelude serve`` of a model, by default the embedded one, ready to answer; ended with the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [*PRELUDE, "serve", "--model", str(model), "--served-model-name", BASE, "--port", str(port)]
    command += ["--store", store or str(folder / "store"), "--kv-cache-memory", "64MiB", *flags]
    folder.mkdir(exist_ok=True)
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, stderr=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            deadline = time.monotonic() + 240  # a busy machine needs minutes to compile the kernels
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass  # it does not listen yet
                time.sleep(0.1)
            yield client, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()
            process.wait()
            log.close()
