"""One engine process, from its start to its end, seen from the API process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from server.config import EngineSettings
from server.engine.frames import HEADER_BYTES
from server.engine.messages import (
    FromEngine,
    Progress,
    Ready,
    Stage,
    Start,
    StartFailed,
    ToEngine,
    encode_frame,
    from_engine_decoder,
)
from server.engine.process.started_process import StartedProcess
from server.engine.shared_memory import mapped_segments, remove_segments
from server.engine.types import ModelInfo
from server.errors import EngineDeadError, EngineStartError

logger = logging.getLogger(__name__)


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
        """Wait until the process ends, and kill it if that takes too long; returns how it ended."""
        ...


class ProcessConnection:
    """An ``EngineConnection`` to the process of either engine, created by ``launch``.

    Args:
        process: The process, which is the first of its process group.
        reader: What it sends.
        writer: What it receives.
        model: The model that it has loaded.
    """

    def __init__(
        self,
        process: StartedProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        model: ModelInfo,
    ) -> None:
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
        self._process.kill()
        self._writer.transport.abort()

    async def close(self) -> str:
        """Wait until the process ends; see ``EngineConnection.close``."""
        self._writer.close()
        return await self._process.end()


async def launch(
    settings: EngineSettings,
    process: StartedProcess | None = None,
    *,
    on_stage: Callable[[Stage], None] = lambda _: None,
) -> EngineConnection:
    """Start a process and wait for its model. If this fails or is cancelled, no process is left behind.

    Args:
        settings: The model and its limits.
        process: A process that was started with these settings, and has no other use; None starts one.
        on_stage: Called at the beginning of each stage of the start.

    Raises:
        EngineStartError: If the process cannot serve with these settings.
    """
    process = process or StartedProcess(settings)
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection(sock=process.take_socket())
        writer.write(encode_frame(Start(settings)))
        while isinstance(first := from_engine_decoder.decode(await _read_frame(reader)), Progress):
            on_stage(first.stage)
        if isinstance(first, StartFailed):
            raise EngineStartError(first.message)
        if not isinstance(first, Ready):
            raise EngineStartError(f"the engine process began with {type(first).__name__}")
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        if writer is not None:
            writer.close()
        ended = await process.end()
        raise EngineStartError(f"the engine process {ended} while it started") from error
    except BaseException as error:
        if not isinstance(error, EngineStartError):
            process.kill()
        if writer is not None:
            writer.close()
        await process.end()
        raise
    # vLLM's processes do not remove it when they are killed.
    process.resources.callback(remove_segments, mapped_segments(process.pid))
    return ProcessConnection(process, reader, writer, first.model)


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(HEADER_BYTES)
    return await reader.readexactly(int.from_bytes(header, "big"))
