"""Servers as users start them, for the tests that look from outside."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.demo.tour import MODEL_DIRECTORY, SOFT_PROMPTS_DIRECTORY
from tests.support.waiting import seconds_until

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


def free_port() -> int:
    """A port of loopback that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def server_process(
    command: Sequence[str], url: str, *, log: Path | None = None, seconds: float = 240.0, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it answers 200, and end it with the block.

    Args:
        command: Program and arguments.
        url: Where it answers when it is ready.
        log: File for its standard error; None leaves it on the terminal.
        seconds: Time to get ready; a busy machine needs minutes to compile the kernels.
        options: More arguments of ``subprocess.Popen``.

    Raises:
        RuntimeError: If it ends or does not answer in time; with its log.
    """
    with ExitStack() as stack:
        if log is not None:
            options["stderr"] = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(command, **options)
        try:
            http = stack.enter_context(httpx.Client(timeout=5))
            seconds_until(lambda: process.poll() is not None or _is_ready(http, url), seconds, pause=0.1)
            if process.poll() is not None or not _is_ready(http, url):
                found = "" if log is None else log.read_text()
                raise RuntimeError(f"the server did not start (status {process.poll()}): {found}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            finally:
                process.kill()
                process.wait()


def engine_of(server: psutil.Process) -> psutil.Process:
    """The engine process of a server now."""
    children = server.children(recursive=True)
    (engine,) = [child for child in children if "server.engine.process.engine_process" in child.cmdline()]
    return engine


def metric(exposition: str, name: str) -> float:
    """The value of a sample, by its name and labels; 0 if there is none."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", exposition, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _is_ready(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url).status_code == 200
    except httpx.TransportError:
        return False  # it does not listen yet


@contextmanager
def serving(
    folder: Path,
    *flags: str,
    model: Path = MODEL_DIRECTORY,
    store: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """``prelude serve`` of a model, by default the embedded one, ready to answer; ended with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *PRELUDE,
        "serve",
        "--model",
        str(model),
        "--served-model-name",
        BASE,
        "--port",
        str(port),
    ]
    command += ["--store", store or str(folder / "store"), "--kv-cache-memory", "64MiB", *flags]
    folder.mkdir(exist_ok=True)
    with (
        server_process(command, f"{url}/ready", log=folder / "log", env=environment) as process,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client, process
