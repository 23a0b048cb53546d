"""One engine process as the operating system sees it: started, killed, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from types import TracebackType

from server.config import EngineSettings
from server.engine.messages import DEVICE_FAILED_STATUS
from server.engine.process.command import command, environment
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0

_POLL_SECONDS = 0.02


class StartedProcess:
    """An engine process, which imports its libraries while it waits for the first message.

    Leaving its context kills it if it still runs.

    Args:
        settings: Which engine to start, and its surroundings.

    Attributes:
        resources: What the process needs; closed when it has ended.

    Raises:
        EngineStartError: If it cannot be started.
    """

    def __init__(self, settings: EngineSettings) -> None:
        with ExitStack() as resources:
            program, variables = command(settings), resources.enter_context(environment(settings))
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._process = subprocess.Popen(  # noqa: S603 - our own module, by an interpreter of the operator
                        [*program, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                        env=variables,
                    )
                except OSError as error:
                    ours.close()
                    raise EngineStartError(f"the engine process cannot be started: {error}") from error
            self._socket: socket.socket | None = ours
            self.resources = resources.pop_all()

    def __enter__(self) -> StartedProcess:
        """The process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill the process if it still runs."""
        with self.resources:
            if self._socket is not None:
                self._socket.close()
            if self._process.poll() is None:
                self.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_SECONDS)

    @property
    def pid(self) -> int:
        """The process id, which is that of its process group, too."""
        return self._process.pid

    def take_socket(self) -> socket.socket:
        """Our end of the connection, which the caller closes. May be called once."""
        taken, self._socket = self._socket, None
        if taken is None:
            raise RuntimeError("the connection to the engine process is in use")
        return taken

    def kill(self) -> None:
        """Kill it and all that it has started: they are one process group, which exists as long as one of them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def end(self) -> str:
        """Wait until it ends, and kill it after ``STOP_SECONDS``; returns how it ended."""
        with self.resources:
            if not await self._ends():
                logger.warning("the engine process %d does not stop; killing it", self.pid)
                self.kill()
                await self._ends()  # a dead device may block even a killed process in the kernel
            self.kill()  # what it has started may still run, and hold the device
            return how_it_ended(self._process.returncode)

    async def _ends(self) -> bool:
        """Wait for ``STOP_SECONDS`` until it ends; returns whether it did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while self._process.poll() is None:  # noqa: ASYNC110 - it may have been started outside of any loop
                    await asyncio.sleep(_POLL_SECONDS)
        return self._process.poll() is not None


def how_it_ended(status: int | None) -> str:
    """An exit status in words; None if the process still runs."""
    if status is None:
        return "cannot be killed"
    if status == DEVICE_FAILED_STATUS:
        return f"ended with status {status}: the device failed"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
