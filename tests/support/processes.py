"""Servers in separate processes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.waiting import seconds_until

PRELUDE = [sys.executable, "-c", "from server.cli import main; main()"]


def free_port() -> int:
    """A port of loopback that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def server_process(
    command: Sequence[str], url: str, *, log: Path | None = None, seconds: float = 240.0, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it answers 200, and stop it after the block.

    Args:
        command: Program and arguments.
        url: Answers 200 when the server is ready.
        log: File for its standard error; None leaves it on the terminal.
        seconds: Timeout of the start.
        options: More arguments of ``subprocess.Popen``.

    Raises:
        RuntimeError: If it ends or does not answer in time; the message has its log.
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
    """The current engine process of a server."""
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
        return False  # the server does not listen yet
