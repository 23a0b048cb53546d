"""The process of the second engine, run by the interpreter of vLLM's environment.

Run as ``python -m server.engine.vllm.main FD``, where FD is one end of a socket pair; it exchanges the messages of
``server.engine.messages``, as the native engine's process does. It is the first of its process group, so that the
server can end vLLM's own processes with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from server.config import EngineSettings
from server.engine.frames import HEADER_BYTES, MAX_BODY_BYTES
from server.engine.messages import (
    FromEngine,
    Progress,
    Ready,
    Shutdown,
    Stage,
    Start,
    StartFailed,
    ToEngine,
    encode_frame,
    to_engine_decoder,
)
from server.engine.shared_memory import mapped_segments, remove_segments
from server.errors import EngineStartError
from server.logs import configure_from_variables

if TYPE_CHECKING:
    from server.engine.vllm.service import Service

logger = logging.getLogger(__name__)

VLLM_ENDED_STATUS = 4
"""Exit status after the end of vLLM's own processes."""

POLL_SECONDS = 0.2
"""Time between looks at vLLM's own processes, whose end nobody reports to an idle engine."""


class ClosedError(Exception):
    """The server has closed the connection."""


async def serve(connection: socket.socket) -> int:
    """Serve until a Shutdown arrives, or vLLM ends; returns the exit status.

    Raises:
        ClosedError: If the server is gone.
    """
    reader, writer = await asyncio.open_connection(sock=connection)

    def send(message: FromEngine) -> None:
        if not writer.is_closing():
            writer.write(encode_frame(message))

    first = await _receive(reader)
    if not isinstance(first, Start):
        return 0
    send(Progress(Stage.LOADING))
    try:
        service = _start(first.settings, send)
    except EngineStartError as error:
        send(StartFailed(error.message))
        await _close(writer)
        return 1
    send(Progress(Stage.CHECKING))
    try:
        await service.finish_start()
    except EngineStartError as error:
        send(StartFailed(error.message))
        await service.close()
        await _close(writer)
        return 1
    send(Ready(service.model))
    reporting = asyncio.create_task(service.report_metrics())
    status = await _loop(reader, service)
    reporting.cancel()
    await service.close()
    await _close(writer)
    return status


def _start(settings: EngineSettings, send: Callable[[FromEngine], None]) -> Service:
    """Load the model.

    Raises:
        EngineStartError: If vLLM is missing, another version, or cannot serve the model.
    """
    try:
        from server.engine.vllm.service import Service  # noqa: PLC0415 - the environment may have no vllm
    except ImportError as error:
        raise EngineStartError(
            f"--engine-python {sys.executable} cannot import what engine vllm needs: {error}"
        ) from error
    return Service(settings, send)


async def _loop(reader: asyncio.StreamReader, service: Service) -> int:
    receiving = asyncio.ensure_future(_receive(reader))
    while True:
        waited: list[asyncio.Future[Any]] = [receiving, service.ended]
        await asyncio.wait(waited, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if service.has_ended:
            receiving.cancel()
            logger.error("vLLM's own processes have ended")
            return VLLM_ENDED_STATUS
        if receiving.done():
            message = receiving.result()
            if isinstance(message, Shutdown):
                return 0
            service.receive(message)
            receiving = asyncio.ensure_future(_receive(reader))


async def _receive(reader: asyncio.StreamReader) -> ToEngine:
    try:
        length = int.from_bytes(await reader.readexactly(HEADER_BYTES), "big")
        if length > MAX_BODY_BYTES:
            raise ClosedError
        return to_engine_decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise ClosedError from error


async def _close(writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        await writer.drain()
    writer.close()


def main() -> None:
    """Entry point of the process."""
    configure_from_variables("engine")
    if logging.getLogger().level > logging.DEBUG:
        logging.getLogger("vllm").setLevel(logging.WARNING)  # its own account of a start takes a screen
    # Ctrl-C reaches every process of the terminal; the server decides when its engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        status = asyncio.run(serve(connection))
    except ClosedError:
        # Nobody is left to end vLLM's processes.
        remove_segments(mapped_segments(os.getpgid(0)))
        os.killpg(os.getpgid(0), signal.SIGKILL)
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    main()
