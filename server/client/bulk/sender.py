"""Send rows in concurrent batches with retries, and yield the answers in the order of the rows.

One task reads ahead, groups rows that can share a request, and keeps the configured number of sequences in flight.
Each batch is a separate task that ends with an outcome for every row. Everything is bounded: buffered rows, their
bytes, and the time without any response.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.client.bulk.reorder import ReorderBuffer
from server.client.bulk.request_template import BatchKey, RequestTemplate, is_shared, responses
from server.client.bulk.rows import Row
from server.client.bulk.transport import NoResponseError, Response, Transport

_AHEAD = 4
"""Maximum number of buffered rows, in multiples of those in flight, so that a slow batch does not stop others."""

_WINDOW_BYTES = 64 * 1024 * 1024
"""Maximum size of the buffered lines."""

_BATCH_BYTES = 1024 * 1024
"""Maximum size of the lines in one request; servers accept bodies of 8 MiB by default."""

_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 10.0
_DECREASE, _INCREASE = 0.7, 0.05
"""Multiplicative decrease and additive increase of the concurrency window when the server is full."""

_MAX_FAILURES = 3
"""Number of 5xx responses to a batch before it is split."""

_SERVED_BY = "x-prelude-prompt"
_FULL = frozenset({429, 503})
_RETRIED = frozenset({408, 425, 429, 502, 503, 504})
_FATAL = frozenset({401, 403, 404, 405, 415})
"""Statuses that every row would get; they stop the run. Redirects are treated alike."""


class SenderError(Exception):
    """The run cannot continue; rows that were yielded remain valid.

    Attributes:
        status: The HTTP status; None if there was no response.
        code: The server's ``error.code``, or ``unreachable``.
    """

    def __init__(self, message: str, *, status: int | None, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one row: a response or an error.

    Attributes:
        row: The row.
        response: The response as it is written to the output.
        error: ``message``, ``code`` and, if the server answered, ``status``.
    """

    row: Row
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SendLimits:
    """Limits of concurrency and time.

    Attributes:
        concurrency: Maximum number of sequences in flight.
        rows_per_request: Maximum number of rows in one request.
        patience: Seconds without any successful response before the run gives up.
        timeout: Timeout of one request in seconds.
    """

    concurrency: int = 512
    rows_per_request: int = 32
    patience: float = 300.0
    timeout: float = 600.0


@dataclass(slots=True)
class Tally:
    """Counters of requests and tokens."""

    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class _Batch:
    key: BatchKey
    rows: list[Row] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a request has failed.

    Attributes:
        message: The error message.
        code: The server's ``error.code``; ``unreachable`` or ``timeout`` without a response.
        status: The HTTP status, if there was a response.
        retry_after: Seconds to wait before a retry, as requested by the server.
        is_final: Whether a retry would fail in the same way.
    """

    message: str
    code: str
    status: int | None = None
    retry_after: float = 0.0
    is_final: bool = False


class Sender:
    """Sends rows to one server. Can be used once.

    Args:
        http: Transport to the server.
        template: The requests to send.
        limits: How much is sent at once.
    """

    def __init__(self, http: Transport, template: RequestTemplate, limits: SendLimits) -> None:
        self.tally = Tally()
        self._http = http
        self._template = template
        self._limits = limits
        self._sequences_per_row = template.sequences_per_row
        self._rows_per_request = max(
            1, min(limits.rows_per_request, limits.concurrency // (2 * self._sequences_per_row))
        )
        self._partial: dict[BatchKey, _Batch] = {}
        self._ready: deque[_Batch] = deque()
        self._running: dict[asyncio.Task[list[Outcome]], int] = {}
        self._finished: list[asyncio.Task[list[Outcome]]] = []
        self._has_finished = asyncio.Event()
        self._in_flight = 0
        self._num_outstanding = 0
        self._outstanding_bytes = 0
        self._last_response_at = time.monotonic()
        self._window = float(limits.concurrency)
        self._shrunk_at = 0.0
        self._random = random.Random()  # noqa: S311 - jitter of retries

    async def outcomes(self, rows: Iterator[Row]) -> AsyncGenerator[list[Outcome], None]:
        """Send all rows, and yield their outcomes in order. Closing the generator early cancels all requests.

        Args:
            rows: In order, with consecutive indices.

        Raises:
            SenderError: If the run cannot continue.
        """
        buffer: ReorderBuffer[Outcome] | None = None
        is_end = False
        self._last_response_at = time.monotonic()
        try:
            while True:
                while not is_end and self._has_room():
                    row = next(rows, None)
                    if row is None:
                        is_end = True
                        break
                    buffer = ReorderBuffer(row.index) if buffer is None else buffer
                    self._num_outstanding += 1
                    self._outstanding_bytes += row.num_bytes
                    if row.fault is not None:
                        error = {"message": row.fault, "code": "invalid_row"}
                        buffer.add(row.index, Outcome(row, error=error))
                    else:
                        self._add_to_batch(row)
                self._start(must_empty=is_end or not self._has_room())
                if buffer is not None and (ready := buffer.take()):
                    self._num_outstanding -= len(ready)
                    self._outstanding_bytes -= sum(outcome.row.num_bytes for outcome in ready)
                    yield ready
                    continue
                if not self._running:
                    if is_end and not self._num_outstanding:
                        return
                    continue
                # asyncio.wait would visit all running tasks each time one of them ends.
                await self._has_finished.wait()
                self._has_finished.clear()
                finished, self._finished = self._finished, []
                for task in finished:
                    self._in_flight -= self._running.pop(task)
                    for outcome in task.result():
                        if buffer is not None:
                            buffer.add(outcome.row.index, outcome)
        finally:
            # Not a TaskGroup: in a generator, it would wrap the GeneratorExit of an early close in a group of errors.
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    # Batches

    def _has_room(self) -> bool:
        bound = max(_AHEAD * self._limits.concurrency // self._sequences_per_row, 2 * self._rows_per_request)
        return self._num_outstanding < bound and self._outstanding_bytes < _WINDOW_BYTES

    def _add_to_batch(self, row: Row) -> None:
        """Add a row to the batch of its key."""
        key = self._template.key(row)
        batch = self._partial.get(key)
        if batch is not None and batch.num_bytes + row.num_bytes > _BATCH_BYTES:
            self._ready.append(self._partial.pop(key))
            batch = None
        if batch is None:
            batch = self._partial[key] = _Batch(key)
        batch.rows.append(row)
        batch.num_bytes += row.num_bytes
        if len(batch.rows) >= self._rows_per_request or not is_shared(key):
            self._ready.append(self._partial.pop(key))

    def _start(self, *, must_empty: bool) -> None:
        """Send batches while the window has room; incomplete batches only if no more rows can be read now."""
        while True:
            if not self._ready and must_empty and self._partial:
                self._ready.append(self._partial.pop(next(iter(self._partial))))
            if not self._ready:
                return
            weight = len(self._ready[0].rows) * self._sequences_per_row
            if self._running and self._in_flight + weight > self._window:
                return
            batch = self._ready.popleft()
            self._in_flight += weight
            task = asyncio.create_task(self._resolve(batch.key, batch.rows))
            task.add_done_callback(self._note_finished)
            self._running[task] = weight

    def _note_finished(self, task: asyncio.Task[list[Outcome]]) -> None:
        self._finished.append(task)
        self._has_finished.set()

    # Requests

    async def _resolve(self, key: BatchKey, rows: Sequence[Row]) -> list[Outcome]:
        """Send a batch, with retries, until every row has an outcome."""
        if len(rows) > self._rows_per_request:  # the limit was lowered after the batch was made
            return await self._resolve_halves(key, rows)
        num_tries, num_failures = 0, 0
        while True:
            result = await self._send(key, rows)
            if not isinstance(result, _Failure):
                return [Outcome(row, response) for row, response in zip(rows, result, strict=True)]
            if self._is_fatal(key, result):
                raise SenderError(result.message, status=result.status, code=result.code)
            num_failures += result.status is not None and result.status not in _RETRIED
            if result.is_final or num_failures >= _MAX_FAILURES:
                return await self._split(key, rows, result)
            if time.monotonic() - self._last_response_at > self._limits.patience:
                raise SenderError(
                    f"no response for {self._limits.patience:g} s; last error: {result.message}",
                    status=result.status,
                    code=result.code,
                )
            self.tally.retries[result.code] += 1
            if result.status in _FULL:
                self._shrink_window()
            await asyncio.sleep(self._pause(num_tries, result.retry_after))
            num_tries += 1

    @staticmethod
    def _is_fatal(key: BatchKey, result: _Failure) -> bool:
        """Whether every other row would fail in the same way."""
        if result.status == 404 and key.is_rows_own:
            return False
        return result.status in _FATAL or (result.status is not None and 300 <= result.status < 400)

    async def _split(self, key: BatchKey, rows: Sequence[Row], failure: _Failure) -> list[Outcome]:
        """Find the rejected rows: send each half separately, down to single rows."""
        if len(rows) == 1:
            error: dict[str, Any] = {"message": failure.message, "code": failure.code}
            if failure.status is not None:
                error["status"] = failure.status
            return [Outcome(rows[0], error=error)]
        outcomes = await self._resolve_halves(key, rows)
        if all(outcome.error is None for outcome in outcomes):
            # Every row is valid, so the batch was too large for the server.
            self._rows_per_request = min(self._rows_per_request, (len(rows) + 1) // 2)
        return outcomes

    async def _resolve_halves(self, key: BatchKey, rows: Sequence[Row]) -> list[Outcome]:
        middle = len(rows) // 2
        return await self._resolve(key, rows[:middle]) + await self._resolve(key, rows[middle:])

    def _shrink_window(self) -> None:
        """Reduce the window, at most once per second: a full server rejects many requests at a time."""
        now = time.monotonic()
        if now - self._shrunk_at > 1.0:
            self._shrunk_at = now
            self._window = max(self._window * _DECREASE, float(self._sequences_per_row))

    def _grow_window(self, num_rows: int) -> None:
        self._window = min(
            self._window + _INCREASE * num_rows * self._sequences_per_row, float(self._limits.concurrency)
        )

    def _pause(self, num_tries: int, retry_after: float) -> float:
        """Seconds before the next try: exponential backoff with jitter, added to the server's ``Retry-After``."""
        most = min(_BACKOFF_SECONDS * 2.0 ** min(num_tries, 10), _MAX_BACKOFF_SECONDS)
        return retry_after + self._random.uniform(0.5, 1.0) * most

    async def _send(self, key: BatchKey, rows: Sequence[Row]) -> list[dict[str, Any]] | _Failure:
        self.tally.requests += 1
        content = json.dumps(self._template.body(key, rows), ensure_ascii=False).encode()
        try:
            async with asyncio.timeout(self._limits.timeout):
                response = await self._http.post(key.path, content)
        except TimeoutError:
            return _Failure(f"no response within {self._limits.timeout:g} s", "timeout")
        except NoResponseError as error:
            return _Failure(f"{self._http.base_url} cannot be reached: {error}", "unreachable")
        if not 200 <= response.status < 300:
            return _failure(response, self._http.base_url + key.path)
        self._last_response_at = time.monotonic()
        self._grow_window(len(rows))
        try:
            reply = json.loads(response.content)
            result = responses(key, reply, response.headers.get(_SERVED_BY), len(rows))
            usage = reply["usage"]
            self.tally.prompt_tokens += usage["prompt_tokens"]
            self.tally.completion_tokens += usage["completion_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise SenderError(
                f"{self._http.base_url}{key.path}: {error}: is this a Prelude server?",
                status=None,
                code="not_prelude",
            ) from error
        return result


def _failure(response: Response, url: str) -> _Failure:
    status = response.status
    try:
        error: Mapping[str, Any] = json.loads(response.content)["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        message, code = f"{url} answered {status}: is this a Prelude server?", "not_prelude"
    is_final = 400 <= status < 500 and status not in _RETRIED
    is_final = is_final or response.headers.get("x-should-retry") == "false"
    return _Failure(message, code, status, _retry_after(response.headers), is_final)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of ``retry-after-ms`` or ``Retry-After``, at most 60; dates are ignored."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return min(max(float(headers[name]) * unit, 0.0), 60.0)
        except (KeyError, ValueError):
            continue
    return 0.0
