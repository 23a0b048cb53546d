"""The engine as seen from the API process: keeps its process alive, sends it requests, hands out its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from server.config import EngineSettings
from server.engine.interface import GenerateRequest, TokenEvent
from server.engine.messages import (
    AbortRequest,
    AddRequest,
    Inspect,
    Inspected,
    Pin,
    Shutdown,
    StepOutputs,
    ToEngine,
    Unpin,
)
from server.engine.process.connection import STOP_SECONDS, EngineConnection, launch
from server.engine.process.supervision import Backoff, StepWatch
from server.engine.process.totals import totals_of, with_totals
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
    WaitTimeoutError,
)

logger = logging.getLogger(__name__)

MAX_INSPECTIONS = 16
"""Inspections that may wait for the one thread that does them."""

_LOOKS_PER_TIMEOUT = 8


class AsyncEngine:
    """An ``Engine`` whose model lives in a process of its own, which is started again when it dies or is stuck.

    Args:
        settings: What the engine process is started with.
        launch: Starts a process; raises EngineStartError where it cannot serve, and ends it when cancelled.
        sleep: Waits so many seconds between two attempts to start one.
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
        self._on_restarted: list[Callable[[], None]] = []
        self._restarting: asyncio.Task[None] | None = None
        self._look_seconds = settings.step_timeout / _LOOKS_PER_TIMEOUT
        self._watch = StepWatch(settings.step_timeout, self._look_seconds)
        self._ended = EngineStats()
        """Counters of the processes that have ended."""
        self._stats = EngineStats()
        self._queues: dict[str, asyncio.Queue[TokenOutput | EngineError]] = {}
        self._inspections: dict[int, asyncio.Future[Inspection]] = {}
        self._pinned: dict[str, SoftPromptSource] = {}
        self._num_inspections = 0
        self._prepared = 0
        self._draining = False
        self._idle = asyncio.Event()

    @property
    def model(self) -> ModelInfo:
        """The resident model; EngineNotReadyError while it has never been loaded."""
        if self._model is None:
            raise EngineNotReadyError("the model is still being loaded")
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._connection is not None and not self._draining

    @property
    def outage(self) -> str | None:
        """Why the engine is being restarted; None when it is not."""
        return self._outage

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its newest step; its counters never go back."""
        return self._stats

    def subscribe(self, on_restarted: Callable[[], None]) -> None:
        """Call something after each restart, before another request is taken."""
        self._on_restarted.append(on_restarted)

    async def start(self) -> None:
        """Start the process and wait for its model; EngineStartError if it cannot serve."""
        self._connect(await self._launch(self._settings))
        self._supervising = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Continue one text; see ``Engine.generate``."""
        self._require_ready()
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
                    others=list(request.others),
                    salt=request.salt,
                    priority=request.priority,
                    timeout=request.timeout,
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
                if output.finish_reason is FinishReason.NOT_FINITE:
                    raise NotFiniteError(output.error or "the engine gave no reason")
                if output.finish_reason is FinishReason.REFUSED:
                    raise RequestRefusedError(output.error or "the engine gave no reason")
                if output.finish_reason is FinishReason.CONSTRAINT:
                    raise ConstraintError(output.error or "the constraint cannot be satisfied")
                if output.finish_reason is FinishReason.TIMEOUT:
                    raise WaitTimeoutError(output.error or "the request waited too long")
                if output.num_cached_tokens is not None:
                    num_cached = output.num_cached_tokens
                yield TokenEvent(
                    output.token_ids,
                    output.finish_reason,
                    output.stop_token_id,
                    num_cached,
                    output.queue_seconds,
                    output.prefill_seconds,
                    output.logprobs,
                    output.prompt_logprobs,
                    output.class_logits,
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
        """Keep a soft prompt's rows in the engine's host memory, also in that of a restarted one."""
        self._pinned[soft_prompt.identity] = soft_prompt
        self._send(Pin(soft_prompt))

    def unpin(self, soft_prompt: SoftPromptSource) -> None:
        """End a pin."""
        self._pinned.pop(soft_prompt.identity, None)
        self._send(Unpin(soft_prompt))

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        """Compare a soft prompt with the model; see ``Engine.inspect``."""
        self._require_ready()
        if len(self._inspections) >= MAX_INSPECTIONS:
            raise OverloadedError(f"{MAX_INSPECTIONS} inspections are waiting; try again later")
        self._num_inspections += 1
        # It stays when its caller is cancelled: the engine works on it all the same, and the bound is of its work.
        future: asyncio.Future[Inspection] = asyncio.get_running_loop().create_future()
        self._inspections[self._num_inspections] = future
        self._send(Inspect(self._num_inspections, soft_prompt, num_nearest))
        return await future

    async def drain(self, timeout_seconds: float) -> None:
        """Take no new requests, and end what has not finished after the timeout. A dead engine is left dead."""
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
        """End the process: by request, then by signal."""
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

    # The life of processes

    def _connect(self, connection: EngineConnection) -> None:
        self._watch = StepWatch(self._settings.step_timeout, self._look_seconds)
        self._model = model = connection.model
        begun = EngineStats(num_blocks=model.num_blocks, block_size=model.block_size)
        self._stats = with_totals(begun, self._ended)
        self._connection = connection
        self._outage = None
        for source in self._pinned.values():
            self._send(Pin(source))

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
        """Hand out what a process sends, until it ends."""
        watching = asyncio.create_task(self._look_after(connection), name="engine-watchdog")
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
            self._ended = totals_of(self._stats)
            self._stats = self._ended
            self._outage = None if self._draining else reason
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
        """Whether tokenizer, stored soft prompts and told limits still fit; only the memory may have changed."""
        return msgspec.structs.replace(model, num_blocks=self.model.num_blocks) == self.model

    async def _look_after(self, connection: EngineConnection) -> None:
        """Kill a process whose step does not end."""
        if self._look_seconds <= 0:
            return
        while not self._watch.look():  # noqa: ASYNC110 - it counts looks; there is no event to wait for
            await asyncio.sleep(self._look_seconds)
        for stats in (self._stats, self._ended):
            stats.step_timeouts += 1
        logger.error(
            "a step of the engine process %d has taken more than %g s (--step-timeout); killing it",
            connection.pid,
            self._settings.step_timeout,
        )
        connection.kill()

    # What goes to a process and comes from it

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
            self._stats = with_totals(message.stats, self._ended)
            for output in message.outputs:
                queue = self._queues.get(output.request_id)
                if queue is not None:  # else its reader has gone, and it is aborted already
                    queue.put_nowait(output)
        elif isinstance(message, Inspected):
            self._end_inspection(message)

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
        self._note_idle()
