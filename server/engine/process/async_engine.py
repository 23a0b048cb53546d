"""The engine as seen from the API process: supervises its process, sends requests and distributes the events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

import msgspec

from server.config import EngineSettings
from server.engine.messages import (
    AbortRequest,
    AdapterInspection,
    BatchPicture,
    Exposition,
    Inspect,
    InspectAdapter,
    Inspected,
    Pin,
    PinAdapter,
    Shutdown,
    StepOutputs,
    ToEngine,
    Unpin,
    UnpinAdapter,
)
from server.engine.process.connection import EngineConnection, launch
from server.engine.process.cumulative_stats import add_counters, counters_of
from server.engine.process.started_process import STOP_SECONDS
from server.engine.process.supervision import Backoff, StepWatch
from server.engine.process.watching import EngineView
from server.engine.stats import EngineStats
from server.engine.types import (
    AdapterSource,
    Capability,
    ErrorCode,
    GenerateRequest,
    Inspection,
    ModelInfo,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)
from server.errors import (
    ConstraintError,
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineRestartingError,
    EngineStartError,
    NotFiniteError,
    OverloadedError,
    RequestFailedError,
    RequestRefusedError,
    UnsupportedByEngineError,
    WaitTimeoutError,
)

logger = logging.getLogger(__name__)

MAX_INSPECTIONS = 16
"""Inspections that may wait for the one thread that computes them."""

ERRORS: Mapping[ErrorCode, type[EngineError]] = {
    ErrorCode.FAILED: RequestFailedError,
    ErrorCode.NOT_FINITE: NotFiniteError,
    ErrorCode.REFUSED: RequestRefusedError,
    ErrorCode.CONSTRAINT: ConstraintError,
    ErrorCode.WAIT_TIMEOUT: WaitTimeoutError,
}
"""The exception for each code of a ``RequestFailure``."""

_POLLS_PER_TIMEOUT = 8


class AsyncEngine:
    """An ``Engine`` whose model runs in a separate process, which is restarted when it dies or hangs.

    Args:
        settings: The settings of the engine process.
        launch: Starts a process. It raises EngineStartError if the process cannot serve, and ends the process when
            cancelled.
        sleep: Waits for a number of seconds between two attempts to start a process.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        launch: Callable[[EngineSettings], Awaitable[EngineConnection]] = launch,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._launch = launch
        self._sleep = sleep
        self._model: ModelInfo | None = None
        self._connection: EngineConnection | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._outage: str | None = None
        self._since = 0.0
        self._on_restarted: list[Callable[[], None]] = []
        self._restarting: asyncio.Task[None] | None = None
        self._poll_seconds = settings.step_timeout / _POLLS_PER_TIMEOUT
        self._watch = StepWatch(settings.step_timeout, self._poll_seconds)
        self._ended = EngineStats()
        """Counters of the processes that have ended."""
        self._stats = EngineStats()
        self._exposition = ""
        self._queues: dict[str, asyncio.Queue[TokenEvent | EngineError]] = {}
        self._inspections: dict[int, asyncio.Future[Inspection | AdapterInspection]] = {}
        self._pinned: dict[str, SoftPromptSource | AdapterSource] = {}
        self._num_inspections = 0
        self._num_prepared = 0
        self._view = EngineView(self._send)
        self._draining = False
        self._idle = asyncio.Event()

    @property
    def model(self) -> ModelInfo:
        """The resident model; EngineNotReadyError until it is first loaded."""
        if self._model is None:
            raise EngineNotReadyError("the model is still being loaded")
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether the engine accepts requests."""
        return self._connection is not None and not self._draining

    @property
    def outage(self) -> str | None:
        """Why the engine is being restarted; None if it is not."""
        return self._outage

    @property
    def since(self) -> float:
        """Unix time in seconds at which the engine became ready, or its outage began."""
        return self._since

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its newest step. Counters keep counting across restarts."""
        return self._stats

    async def look(self) -> BatchPicture:
        """The running batch; see ``Engine.look``."""
        self._require_ready()
        if Capability.BATCH_PICTURE not in self.model.capabilities:
            raise UnsupportedByEngineError(self.model.refusal(Capability.BATCH_PICTURE))
        return await self._view.look()

    @property
    def exposition(self) -> str:
        """Metrics that the engine has beside ``stats``, in Prometheus' text format; empty if there are none."""
        return self._exposition

    def subscribe(self, on_restarted: Callable[[], None]) -> None:
        """Call a function after each restart, before the engine accepts another request."""
        self._on_restarted.append(on_restarted)

    async def start(self) -> None:
        """Start the process and wait for its model; EngineStartError if it cannot serve."""
        self._connect(await self._launch(self._settings))
        self._supervising = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Continue one text; see ``Engine.generate``."""
        self._require_ready()
        missing = self.model.missing(request)
        if missing is not None:
            raise UnsupportedByEngineError(self.model.refusal(missing))
        queue: asyncio.Queue[TokenEvent | EngineError] = asyncio.Queue()
        self._queues[request.request_id] = queue
        has_ended = False
        try:
            self._send(request)
            while not has_ended:
                event = await queue.get()
                if isinstance(event, EngineError):
                    has_ended = True
                    raise event
                has_ended = event.finish_reason is not None
                yield event
        finally:
            del self._queues[request.request_id]
            self._note_idle()
            if not has_ended:
                self._send(AbortRequest(request.request_id))

    async def prepare(self, soft_prompt: SoftPromptSource | None, adapter: AdapterSource | None = None) -> None:
        """Load a soft prompt, an adapter or both onto the device, by generating one token after a text of one."""
        self._num_prepared += 1
        request = GenerateRequest(
            request_id=f"prepare-{self._num_prepared}",
            prompt_token_ids=[0],
            params=SamplingParams(max_tokens=1, temperature=0.0),
            soft_prompt=soft_prompt,
            adapter=adapter,
        )
        async for _ in self.generate(request):
            pass

    def pin(self, source: SoftPromptSource | AdapterSource) -> None:
        """Keep a soft prompt's rows, or an adapter, in the engine's host memory, also after a restart."""
        self._pinned[source.identity] = source
        self._send(_pin(source))

    def unpin(self, source: SoftPromptSource | AdapterSource) -> None:
        """End a pin."""
        self._pinned.pop(source.identity, None)
        self._send(UnpinAdapter(source) if isinstance(source, AdapterSource) else Unpin(source))

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        """Compare a soft prompt with the model; see ``Engine.inspect``."""
        found = await self._inspect(
            lambda inspection_id: Inspect(inspection_id, soft_prompt, num_nearest), Capability.INSPECTION
        )
        if not isinstance(found, Inspection):
            raise TypeError("the engine answered with the inspection of an adapter")
        return found

    async def inspect_adapter(self, adapter: AdapterSource) -> AdapterInspection:
        """Measure an adapter; see ``Engine.inspect_adapter``."""
        found = await self._inspect(
            lambda inspection_id: InspectAdapter(inspection_id, adapter), Capability.INSPECTION, Capability.ADAPTERS
        )
        if not isinstance(found, AdapterInspection):
            raise TypeError("the engine answered with the inspection of a soft prompt")
        return found

    async def _inspect(
        self, message: Callable[[int], Inspect | InspectAdapter], *needed: Capability
    ) -> Inspection | AdapterInspection:
        self._require_ready()
        for capability in needed:
            if capability not in self.model.capabilities:
                raise UnsupportedByEngineError(self.model.refusal(capability))
        if len(self._inspections) >= MAX_INSPECTIONS:
            raise OverloadedError(f"{MAX_INSPECTIONS} inspections are waiting; try again later")
        self._num_inspections += 1
        # It stays registered when its caller is cancelled, because the engine still works on it.
        future: asyncio.Future[Inspection | AdapterInspection] = asyncio.get_running_loop().create_future()
        self._inspections[self._num_inspections] = future
        self._send(message(self._num_inspections))
        return await future

    async def drain(self, timeout_seconds: float) -> None:
        """Accept no new requests, and end those unfinished after the timeout. A dead engine is not restarted."""
        self._draining = True
        if self._restarting is not None:
            self._restarting.cancel()
        if self._queues or self._inspections:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        for request_id in list(self._queues):
            self._send(AbortRequest(request_id))
        self._fail_all(EngineNotReadyError("the server is shutting down"))

    async def stop(self) -> None:
        """End the process: by message, then by signal."""
        self._draining = True
        supervising, connection = self._supervising, self._connection
        if supervising is None:
            return
        if self._restarting is not None:
            self._restarting.cancel()
        if connection is not None:
            self._send(Shutdown())
            await asyncio.wait([supervising], timeout=STOP_SECONDS)
            if not supervising.done():
                logger.warning("the engine process %d does not stop; killing it", connection.pid)
                connection.kill()
        await asyncio.gather(supervising, return_exceptions=True)

    # Supervising the process

    def _connect(self, connection: EngineConnection) -> None:
        self._watch = StepWatch(self._settings.step_timeout, self._poll_seconds)
        self._model = model = connection.model
        initial = EngineStats(num_blocks=model.num_blocks, block_size=model.block_size)
        self._stats = add_counters(initial, self._ended)
        self._connection = connection
        self._outage = None
        self._since = time.time()
        for source in self._pinned.values():
            self._send(_pin(source))

    async def _supervise(self) -> None:
        backoff, clock = Backoff(), asyncio.get_running_loop().time
        while self._connection is not None:
            started = clock()
            await self._serve(self._connection)
            backoff.served(clock() - started)
            if self._draining:
                return
            self._restarting = asyncio.create_task(self._restart(backoff), name="engine-restart")
            await asyncio.wait([self._restarting])  # a drain cancels it
            self._restarting = None

    async def _serve(self, connection: EngineConnection) -> None:
        """Handle the messages of a process until it ends."""
        watching = asyncio.create_task(self._kill_when_hung(connection), name="engine-watchdog")
        reason = "the engine process ended"
        try:
            while True:
                self._handle(await connection.receive())
        except EngineDeadError as error:
            reason = error.message
        except Exception:
            logger.exception("a message of the engine process cannot be handled; killing it")
            connection.kill()
        finally:
            watching.cancel()
            num_failed = len(self._queues) + len(self._inspections)
            self._connection = None
            self._view.reset()
            self._ended = counters_of(self._stats)
            self._stats = self._ended
            self._outage = None if self._draining else reason
            self._since = time.time()
            self._fail_all(EngineDeadError(reason))
            how = await connection.close()
        if not self._draining:
            self._outage = f"the engine process {how}"
            logger.error("the engine process %d %s; %d requests fail", connection.pid, how, num_failed)

    async def _restart(self, backoff: Backoff) -> None:
        """Start processes until one serves."""
        while True:
            pause = backoff.pause()
            logger.info("restarting the engine in %.1f s", pause)
            await self._sleep(pause)
            try:
                connection = await self._launch(self._settings)
            except Exception as error:
                self._outage = f"the engine cannot start again: {error}"
                logger.error("%s", self._outage, exc_info=not isinstance(error, EngineStartError))
                continue
            if not self._is_same_model(connection.model):
                self._outage = "the engine cannot start again: the model's files have been changed"
                logger.error("%s; put them back or restart the server", self._outage)
                connection.kill()
                await connection.close()
                continue
            self._ended.restarts += 1
            self._connect(connection)
            logger.info("the engine is ready again, in process %d", connection.pid)
            for on_restarted in self._on_restarted:
                on_restarted()
            return

    def _is_same_model(self, model: ModelInfo) -> bool:
        """Whether tokenizer, stored soft prompts and reported limits still apply; memory and threads may differ."""
        own = self.model
        return own == msgspec.structs.replace(model, num_blocks=own.num_blocks, num_threads=own.num_threads)

    async def _kill_when_hung(self, connection: EngineConnection) -> None:
        if self._poll_seconds <= 0:
            return
        while not self._watch.poll():  # noqa: ASYNC110 - it counts polls; there is no event to wait for
            await asyncio.sleep(self._poll_seconds)
        for stats in (self._stats, self._ended):
            stats.step_timeouts += 1
        logger.error(
            "a step of the engine process %d has taken more than %g s (--step-timeout); killing it",
            connection.pid,
            self._settings.step_timeout,
        )
        connection.kill()

    # Exchanging messages

    def _require_ready(self) -> None:
        if self._outage is not None and not self._draining:
            raise EngineRestartingError(f"engine restarting: {self._outage}")
        if not self.is_ready:
            raise EngineNotReadyError("the engine does not accept requests now")

    def _send(self, message: ToEngine) -> None:
        if self._connection is not None:
            self._connection.send(message)
            self._watch.sent()

    def _handle(self, message: object) -> None:
        if isinstance(message, StepOutputs):
            self._watch.stepped(num_received=message.num_received, has_work=message.has_work)
            self._stats = add_counters(message.stats, self._ended)
            for event in message.events:
                queue = self._queues.get(event.request_id)
                if queue is not None:  # else its reader has closed, and an abort has been sent
                    queue.put_nowait(event if event.failure is None else _error_of(event.failure))
        elif isinstance(message, Inspected):
            self._end_inspection(message)
        elif isinstance(message, Exposition):
            self._exposition = message.text
        elif isinstance(message, BatchPicture):
            self._view.receive(message)

    def _end_inspection(self, message: Inspected) -> None:
        future = self._inspections.pop(message.inspection_id, None)
        self._note_idle()
        if future is None or future.done():  # its caller was cancelled
            return
        if isinstance(message.outcome, RequestFailure):
            future.set_exception(_error_of(message.outcome))
        else:
            future.set_result(message.outcome)

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
        self._note_idle()


def _error_of(failure: RequestFailure) -> EngineError:
    return ERRORS[failure.code](failure.message)


def _pin(source: SoftPromptSource | AdapterSource) -> Pin | PinAdapter:
    return PinAdapter(source) if isinstance(source, AdapterSource) else Pin(source)
