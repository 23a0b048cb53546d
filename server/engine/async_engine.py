"""The engine as seen from the API process: starts its process, sends it requests, hands out its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncGenerator

from server.config import EngineSettings
from server.engine.interface import GenerateRequest, TokenEvent
from server.engine.messages import (
    FRAME_HEADER_BYTES,
    AbortRequest,
    AddRequest,
    Inspect,
    Inspected,
    Pin,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    StepOutputs,
    ToEngine,
    Unpin,
    encode_frame,
    from_engine_decoder,
)
from server.engine.types import (
    EngineStats,
    FinishReason,
    Inspection,
    ModelInfo,
    SamplingParams,
    SoftPromptSource,
    TokenOutput,
)
from server.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineStartError,
    OverloadedError,
    RequestFailedError,
)

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0

MAX_INSPECTIONS = 16
"""Inspections that may wait for the one thread that does them."""


class AsyncEngine:
    """An ``Engine`` whose model lives in a process of its own.

    Args:
        settings: What the engine process is started with.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._model: ModelInfo | None = None
        self._stats = EngineStats()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._queues: dict[str, asyncio.Queue[TokenOutput | EngineError]] = {}
        self._inspections: dict[int, asyncio.Future[Inspection]] = {}
        self._num_inspections = 0
        self._prepared = 0
        self._draining = False
        self._idle = asyncio.Event()

    @property
    def model(self) -> ModelInfo:
        """The resident model; EngineNotReadyError while it is not loaded."""
        if self._model is None:
            raise EngineNotReadyError("the model is still being loaded")
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._model is not None and self._writer is not None and not self._draining

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its newest step."""
        return self._stats

    async def start(self) -> None:
        """Start the process and wait for its model; EngineStartError if it cannot serve."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.engine.engine_process",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(encode_frame(Start(self._settings)))
        try:
            first = from_engine_decoder.decode(await _read_frame(reader))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            status = await self._process.wait()
            raise EngineStartError(f"the engine process ended with status {status} while it started") from error
        if isinstance(first, StartFailed):
            writer.close()
            await self._process.wait()
            raise EngineStartError(first.message)
        if not isinstance(first, Ready):
            raise EngineStartError(f"the engine process began with {type(first).__name__}")
        self._writer = writer
        self._model = first.model
        self._stats = EngineStats(num_blocks=first.model.num_blocks)
        self._reading = asyncio.create_task(self._read(reader), name="engine-reader")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Continue one text; see ``Engine.generate``."""
        if not self.is_ready or self._writer is None:
            raise EngineNotReadyError("the engine takes no requests now")
        queue: asyncio.Queue[TokenOutput | EngineError] = asyncio.Queue()
        self._queues[request.request_id] = queue
        ended = False
        num_cached = 0
        try:
            self._send(
                AddRequest(
                    request_id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    params=request.params,
                    soft_prompt=request.soft_prompt,
                    salt=request.salt,
                )
            )
            while not ended:
                output = await queue.get()
                if isinstance(output, EngineError):
                    ended = True
                    raise output
                ended = output.finish_reason is not None
                if output.finish_reason is FinishReason.ERROR:
                    raise RequestFailedError(output.error or "the engine gave no reason")
                if output.num_cached_tokens is not None:
                    num_cached = output.num_cached_tokens
                yield TokenEvent(
                    output.token_ids,
                    output.finish_reason,
                    output.stop_token_id,
                    num_cached,
                    output.logprobs,
                    output.prompt_logprobs,
                )
        finally:
            del self._queues[request.request_id]
            self._note_idle()
            if not ended:
                self._send(AbortRequest(request.request_id))

    async def prepare(self, soft_prompt: SoftPromptSource) -> None:
        """Bring a soft prompt onto the device: by one token after one token of text, as any request would."""
        self._prepared += 1
        request = GenerateRequest(
            f"prepare-{self._prepared}", [0], SamplingParams(max_tokens=1, temperature=0.0), soft_prompt
        )
        async for _ in self.generate(request):
            pass

    def pin(self, soft_prompt: SoftPromptSource) -> None:
        """Keep a soft prompt's rows in the engine's host memory."""
        self._send(Pin(soft_prompt))

    def unpin(self, soft_prompt: SoftPromptSource) -> None:
        """End a pin."""
        self._send(Unpin(soft_prompt))

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        """Compare a soft prompt with the model; see ``Engine.inspect``."""
        if not self.is_ready or self._writer is None:
            raise EngineNotReadyError("the engine takes no requests now")
        if len(self._inspections) >= MAX_INSPECTIONS:
            raise OverloadedError(f"{MAX_INSPECTIONS} inspections wait already; try again later")
        self._num_inspections += 1
        # It stays when its caller is cancelled: the engine works on it all the same, and the bound is of its work.
        future: asyncio.Future[Inspection] = asyncio.get_running_loop().create_future()
        self._inspections[self._num_inspections] = future
        self._send(Inspect(self._num_inspections, soft_prompt, num_nearest))
        return await future

    async def drain(self, timeout_seconds: float) -> None:
        """Take no new requests, and end what has not finished after the timeout."""
        self._draining = True
        if self._queues or self._inspections:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        for request_id in list(self._queues):
            self._send(AbortRequest(request_id))
        self._fail_all(EngineNotReadyError("the server is shutting down"))

    async def stop(self) -> None:
        """End the process: by request, then by signal."""
        self._draining = True
        self._send(Shutdown())
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                logger.warning("the engine process does not stop by itself and is killed")
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        if self._reading is not None:
            await self._reading
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = from_engine_decoder.decode(await _read_frame(reader))
                if isinstance(message, StepOutputs):
                    self._stats = message.stats
                    for output in message.outputs:
                        queue = self._queues.get(output.request_id)
                        if queue is not None:  # else its reader has gone, and it is aborted already
                            queue.put_nowait(output)
                elif isinstance(message, Inspected):
                    self._end_inspection(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            if not self._draining:
                logger.error("the engine process ended; %d requests fail", len(self._queues))
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._fail_all(EngineDeadError("the engine process ended"))

    def _end_inspection(self, message: Inspected) -> None:
        future = self._inspections.pop(message.inspection_id, None)
        self._note_idle()
        if future is None or future.done():  # its caller has gone
            return
        if message.result is not None:
            future.set_result(message.result)
        else:
            future.set_exception(RequestFailedError(message.error or "the engine gave no reason"))

    def _note_idle(self) -> None:
        if not self._queues and not self._inspections:
            self._idle.set()

    def _fail_all(self, error: EngineError) -> None:
        for queue in self._queues.values():
            queue.put_nowait(type(error)(error.message))
        for future in self._inspections.values():
            if not future.done():
                future.set_exception(type(error)(error.message))
        self._inspections.clear()


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(FRAME_HEADER_BYTES)
    return await reader.readexactly(int.from_bytes(header, "big"))
