"""The server process of a replica: its start, its reports, its end."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import aiohttp
import msgspec

from server.api.keys.signed_callers import INGRESS_HEADER, CallerKind, CallerSigner
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_TIMEOUT = aiohttp.ClientTimeout(total=5)
_LAST_LINES = 20
_KILL_SECONDS = 20.0
"""Seconds that a process has to end after the drain, before it is killed."""


class Report(msgspec.Struct, kw_only=True):
    """What ``/v1/replica`` says; the other fields are for people.

    Attributes:
        load: Sequences, running and waiting.
        capacity: Sequences that are admitted at once.
        tokens: Tokens computed since the start.
        device: Content digests on the device.
        disk: Content digests that are near.
    """

    load: int
    capacity: int
    tokens: int
    device: list[str]
    disk: list[str]


class Place:
    """The directory of one replica on this machine, which no other replica has at the same time.

    The same number is used again after a restart, so local copies of files stay useful and the replica keeps its
    name, by which soft prompts are assigned to it.

    Attributes:
        name: Name of the replica.
        folder: Its directory.

    Args:
        directory: Directory of all replicas of the cluster on this machine.
        base: Name of the base.
        host: Name of the machine, for the name of the replica; None leaves it out.
    """

    def __init__(self, directory: Path, base: str, host: str | None = None) -> None:
        number = 0
        while (lock := _locked(directory / "replicas" / base / str(number))) is None:
            number += 1
        self.name = "-".join(part for part in (base, host, str(number)) if part)
        self.folder = directory / "replicas" / base / str(number)
        self._lock = lock

    def release(self) -> None:
        """Let another replica have it."""
        self._lock.close()


def _locked(folder: Path) -> IO[str] | None:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class ServerProcess:
    """One ``prelude serve`` in a process of its own.

    Attributes:
        name: Name of the replica, in every line of the log.
        url: Where it listens.

    Args:
        name: Name of the replica.
        arguments: Flags of ``prelude serve``, without host, port and name.
        environment: Its environment.
        host: Address to bind.
        signer: Signs what this class asks the server.
        log: File for its log, which is appended to.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        host: str,
        signer: CallerSigner,
        log: Path,
    ) -> None:
        self.name = name
        self._host = host
        self._arguments = arguments
        self._environment = environment
        self._signer = signer
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None
        self._tail: deque[str] = deque(maxlen=_LAST_LINES)
        self._copying: asyncio.Task[None] | None = None
        self._tokens = (time.monotonic(), 0)
        self.url = ""

    @property
    def pid(self) -> int | None:
        """Its process id; None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self, seconds: float) -> None:
        """Start the process, and wait until it is ready, pins and preloads included.

        Raises:
            EngineStartError: If it ends or is not ready in time; the message has its last lines.
        """
        port = _free_port(self._host)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", "server.cluster.replica.launch", str(os.getpid()), "serve"]
        command += ["--host", self._host, "--port", str(port), "--replica-name", self.name, *self._arguments]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *command, env=dict(self._environment), stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        self._copying = asyncio.create_task(self._copy_log(), name=f"log of {self.name}")
        self._http = aiohttp.ClientSession(timeout=_TIMEOUT)
        try:
            async with asyncio.timeout(seconds):
                while not await self.is_ready():
                    if not self.is_running:
                        raise self._ended()
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise EngineStartError(f"{self.name} was not ready within {seconds:g} s: {self._last}") from None

    async def is_ready(self) -> bool:
        """Whether it accepts requests."""
        try:
            status, _ = await self._get("/ready")
        except (aiohttp.ClientError, TimeoutError):
            return False
        return status == 200

    async def check(self) -> None:
        """Check that the process answers.

        Raises:
            EngineStartError: If it has ended.
            aiohttp.ClientError: If it does not answer.
            TimeoutError: If it does not answer in time.
        """
        if not self.is_running:
            raise self._ended()
        await self._get("/live")

    async def report(self) -> Report | None:
        """Its load and what it holds; None while it does not say."""
        try:
            status, body = await self._get("/v1/replica")
        except (aiohttp.ClientError, TimeoutError):
            return None
        return msgspec.json.decode(body, type=Report) if status == 200 else None

    def tokens_per_second(self, report: Report) -> float:
        """Tokens computed per second since the last call."""
        now = time.monotonic()
        (then, before), self._tokens = self._tokens, (now, report.tokens)
        return max(0, report.tokens - before) / max(now - then, 1e-3)

    async def stop(self, drain_seconds: float) -> None:
        """End the process after its running requests, or after the drain."""
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(drain_seconds + _KILL_SECONDS):
                    await process.wait()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._copying is not None:
            await self._copying
        if self._http is not None:
            await self._http.close()

    async def _get(self, path: str) -> tuple[int, bytes]:
        if self._http is None:
            raise aiohttp.ClientConnectionError("the process was not started")
        request_id = uuid.uuid4().hex
        signature = self._signer.sign(
            CallerKind.CLUSTER, "", method="GET", target=path.encode(), request_id=request_id
        )
        headers = {INGRESS_HEADER: signature, "x-request-id": request_id, "host": "localhost"}
        async with self._http.get(self.url + path, headers=headers) as response:
            return response.status, await response.read()

    async def _copy_log(self) -> None:
        """Copy standard error to the file, and remember the last lines."""
        stream = self._process.stderr if self._process is not None else None
        if stream is None:
            return
        with self._log.open("ab", buffering=0) as file:
            while data := await stream.read(65536):
                file.write(data)
                self._tail.extend(data.decode(errors="replace").splitlines())

    def _ended(self) -> EngineStartError:
        status = None if self._process is None else self._process.returncode
        return EngineStartError(f"{self.name} ended with status {status}: {self._last}")

    @property
    def _last(self) -> str:
        return " | ".join(line.strip() for line in self._tail if line.strip()) or "it has written nothing"


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        port: int = probe.getsockname()[1]
    return port
