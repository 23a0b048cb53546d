"""The engine process: a step loop between two queues.

Run as ``python -m server.engine.process.engine_process FD``, where FD is one end of a socket pair. One thread reads
messages into the inbox and another writes frames from the outbox, so the step loop never waits for the socket. When
the other end closes, the process ends: it never outlives the server that started it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from queue import Empty, SimpleQueue

from transformers.utils.logging import disable_progress_bar

from server.engine.frames import receive
from server.engine.llm_engine import LLMEngine
from server.engine.messages import (
    DEVICE_FAILED_STATUS,
    AbortRequest,
    FromEngine,
    Inspect,
    InspectAdapter,
    Pin,
    PinAdapter,
    Progress,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    StepOutputs,
    ToEngine,
    Unpin,
    UnpinAdapter,
    Watch,
    encode_frame,
    to_engine_decoder,
)
from server.engine.process.watching import PictureLease
from server.engine.types import GenerateRequest, TokenEvent
from server.errors import DeviceError, EngineStartError
from server.logs import configure_from_variables

logger = logging.getLogger(__name__)


class EngineLoop:
    """Runs one engine with messages from a socket.

    Args:
        connection: A stream socket; the other end exchanges the messages of ``server.engine.messages``.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: SimpleQueue[ToEngine | None] = SimpleQueue()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        # To close an engine or to free its tensors needs the device, so both stay until the process ends.
        self._failed: tuple[LLMEngine, DeviceError] | None = None

    def run(self) -> int:
        """Serve until a Shutdown arrives or the device fails; returns the exit status."""
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
        writer = threading.Thread(target=self._write, name="engine-writer")
        writer.start()
        try:
            first = self._inbox.get()
            if not isinstance(first, Start):
                return 0
            try:
                # None in the inbox wakes the loop; the next step takes what has been loaded.
                engine = LLMEngine(
                    first.settings,
                    on_loaded=lambda: self._inbox.put(None),
                    on_stage=lambda stage: self._send(Progress(stage)),
                )
            except EngineStartError as error:
                self._send(StartFailed(error.message))
                return 1
            self._send(Ready(engine.model))
            try:
                self._loop(engine)
            except DeviceError as error:
                logger.exception("the engine process ends")
                self._failed = engine, error
                return DEVICE_FAILED_STATUS
            engine.close()
            return 0
        finally:
            self._outbox.put(None)
            writer.join(timeout=5)

    def _loop(self, engine: LLMEngine) -> None:
        """Step until a Shutdown arrives.

        If the device overlaps the host, a step's events are sent beside the next step.
        """
        events: list[TokenEvent] = []
        num_received = 0
        lease = PictureLease(lambda: self._send(engine.picture()))

        def report(*, has_work: bool = True) -> None:
            stats = engine.stats
            self._send(StepOutputs(events=events, stats=stats, num_received=num_received, has_work=has_work))
            events.clear()

        try:
            while True:
                message = None
                if not engine.has_work:
                    message = self._wait(engine.idle_seconds)
                    if message is None:  # the API process does not know that a step starts, and must detect a hang
                        report()
                while True:
                    num_received += message is not None
                    if isinstance(message, Shutdown):
                        return
                    if isinstance(message, Watch):
                        lease.renew(message.seconds)
                    events += self._handle(engine, message)
                    try:
                        message = self._inbox.get_nowait()
                    except Empty:
                        break
                if engine.overlaps_host:
                    events += engine.step(meanwhile=report)
                else:
                    events += engine.step()
                if not engine.overlaps_host or not engine.has_work:
                    # A load that hangs must be detected, too.
                    report(has_work=engine.has_work or engine.is_loading)
                lease.stepped(has_work=engine.has_work)
        finally:
            if events:
                report()

    def _handle(self, engine: LLMEngine, message: ToEngine | None) -> list[TokenEvent]:
        if isinstance(message, GenerateRequest):
            return engine.add(message)
        if isinstance(message, AbortRequest):
            return engine.abort(message.request_id)
        if isinstance(message, Pin | Unpin | PinAdapter | UnpinAdapter):
            engine.pin(message)
        elif isinstance(message, Inspect | InspectAdapter):
            engine.inspect(message, self._send)
        return []

    def _wait(self, seconds: float | None) -> ToEngine | None:
        try:
            return self._inbox.get(timeout=seconds)
        except Empty:
            return None

    def _send(self, message: FromEngine) -> None:
        # Encode here, because the next step changes the statistics in place.
        self._outbox.put(encode_frame(message))

    def _read(self) -> None:
        try:
            while (body := receive(self._connection)) is not None:
                self._inbox.put(to_engine_decoder.decode(body))
        finally:
            self._inbox.put(Shutdown())

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.sendall(frame)
            except OSError:
                return  # the other end has closed; the reading thread ends the loop


def main() -> None:
    """Entry point of the process."""
    configure_from_variables("engine")
    disable_progress_bar()
    # Ctrl-C reaches every process of the terminal; the server decides when its engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    loop = EngineLoop(connection)
    status = loop.run()
    logging.shutdown()
    # Everything is closed. A normal exit would spend a second on tearing down torch and transformers, and the server
    # waits for this process to end.
    os._exit(status)


if __name__ == "__main__":
    main()
