"""One engine process, from its start to its end, seen from the API process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from contextlib import ExitStack
from typing import Protocol

import msgspec

from server.config import EngineSettings
from server.engine.frames import HEADER_BYTES
from server.engine.messages import (
    DEVICE_FAILED_STATUS,
    FromEngine,
    Ready,
    Start,
    StartFailed,
    ToEngine,
    encode_frame,
    from_engine_decoder,
)
from server.engine.process.command import command, environment
from server.engine.shared_memory import mapped_segments, remove_segments
from server.engine.types import ModelInfo
from server.errors import EngineDeadError, EngineStartError

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0


class EngineConnection(Protocol):
    """An engine process that has loaded its model; tests replace it with a fake."""

    @property
    def pid(self) -> int:
        """The process id."""
        ...

    @property
    def model(self) -> ModelInfo:
        """The model that it has loaded."""
        ...

    def send(self, message: ToEngine) -> None:
        """Send a message; ignored if the process has ended."""
        ...

    async def receive(self) -> FromEngine:
        """Wait for the next message.

        Raises:
            EngineDeadError: If the process has ended, or sent an unreadable message.
        """
        ...

    def kill(self) -> None:
        """End the process at once; ``receive`` then raises."""
        ...

    async def close(self) -> str:
        """Wait until the process ends, and kill it after ``STOP_SECONDS``; returns how it ended."""
        ...


class ProcessConnection:
    """An ``EngineConnection`` to the process of either engine, created by ``launch``.

    Args:
        process: The process, which is the first of its process group.
        reader: What it sends.
        writer: What it receives.
        model: The model that it has loaded.
        resources: Closed when the process has ended.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        model: ModelInfo,
        resources: ExitStack,
    ) -> None:
        self._resources = resources
        self._process = process
        self._reader = reader
        self._writer = writer
        self._model = model

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def model(self) -> ModelInfo:
        """The model that it has loaded."""
        return self._model

    def send(self, message: ToEngine) -> None:
        """Send a message; see ``EngineConnection.send``."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def receive(self) -> FromEngine:
        """Wait for the next message; see ``EngineConnection.receive``."""
        try:
            return from_engine_decoder.decode(await _read_frame(self._reader))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EngineDeadError("the engine process ended") from error
        except msgspec.DecodeError as error:
            logger.exception("the engine process sent an unreadable message")
            raise EngineDeadError("the engine process sent an unreadable message") from error

    def kill(self) -> None:
        """End the process at once; see ``EngineConnection.kill``."""
        _kill(self._process)
        self._writer.transport.abort()

    async def close(self) -> str:
        """Wait until the process ends; see ``EngineConnection.close``."""
        self._writer.close()
        with self._resources:
            return await _end(self._process)


async def launch(settings: EngineSettings) -> EngineConnection:
    """Start a process and wait for its model. If this fails or is cancelled, no process is left behind.

    Raises:
        EngineStartError: If the process cannot serve with these settings.
    """
    with ExitStack() as resources:
        program, variables = command(settings), resources.enter_context(environment(settings))
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *program, str(theirs.fileno()), pass_fds=[theirs.fileno()], start_new_session=True, env=variables
                )
            except OSError as error:
                ours.close()
                raise EngineStartError(f"the engine process cannot be started: {error}") from error
            except BaseException:
                ours.close()
                raise
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            writer.write(encode_frame(Start(settings)))
            first = from_engine_decoder.decode(await _read_frame(reader))
            if isinstance(first, StartFailed):
                raise EngineStartError(first.message)
            if not isinstance(first, Ready):
                raise EngineStartError(f"the engine process began with {type(first).__name__}")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            ended = await _end(process)
            raise EngineStartError(f"the engine process {ended} while it started") from error
        except BaseException as error:
            if not isinstance(error, EngineStartError):
                _kill(process)
            if writer is not None:
                writer.close()
            await _end(process)
            raise
        # vLLM's processes do not remove it when they are killed.
        resources.callback(remove_segments, mapped_segments(process.pid))
        return ProcessConnection(process, reader, writer, first.model, resources.pop_all())


async def _end(process: asyncio.subprocess.Process) -> str:
    """Wait until a process ends, and kill it if that takes too long; returns how it ended."""
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        logger.warning("the engine process %d does not stop; killing it", process.pid)
        _kill(process)
        with contextlib.suppress(TimeoutError):  # a dead device may block even a killed process in the kernel
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
    _kill(process)  # what it has started may still run, and hold the device
    return _how_it_ended(process.returncode)


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process and all that it has started: they are one process group, which exists as long as one of them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _how_it_ended(status: int | None) -> str:
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


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(HEADER_BYTES)
    return await reader.readexactly(int.from_bytes(header, "big"))
