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

from server.client.bulk.asking import Asking, BatchKey, is_shared, responses
from server.client.bulk.poster import NoAnswerError, Poster, Response
from server.client.bulk.reorder import ReorderBuffer
from server.client.bulk.rows import Row

_AHEAD = 4
"""Maximum number of buffered rows, in multiples of those in flight, so that a slow batch does not stop others."""

_WINDOW_BYTES = 64 * 1024 * 1024
"""Maximum size of the buffered lines."""

_BATCH_BYTES = 1024 * 1024
"""Lines of one request; a server takes bodies of 8 MiB by default."""

_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 10.0
_SLOWER, _FASTER = 0.7, 0.05
"""Multiplicative decrease and additive increase of the concurrency window when the server is full."""

_MAX_FAILURES = 3
"""Number of 5xx responses to a batch before it is split."""

_SERVED_BY = "x-prelude-prompt"
_FULL = frozenset({429, 503})
_RETRIED = frozenset({408, 425, 429, 502, 503, 504})
_FATAL = frozenset({401, 403, 404, 405, 415})
"""Statuses that every row would get; they stop the run. Redirects are treated alike."""


class SendingError(Exception):
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
    """What has come of one row: a response, or an error.

    Attributes:
        row: The row.
        response: What it was answered.
        error: ``message``, ``code`` and, of a server's answer, ``status``.
    """

    row: Row
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much is asked at once, and for how long.

    Attributes:
        concurrency: Sequences at the server at once.
        rows_per_request: Rows that may share a request.
        patience: Seconds without a single answer after which it is given up.
        timeout: Seconds that one answer may take.
    """

    concurrency: int = 512
    rows_per_request: int = 32
    patience: float = 300.0
    timeout: float = 600.0


@dataclass(slots=True)
class Tally:
    """What has been sent and answered so far."""

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
class _Refusal:
    """Why a request was not answered.

    Attributes:
        message: For people.
        code: The server's ``error.code``; ``unreachable`` or ``timeout`` where there was none.
        status: The HTTP status, if there was one.
        wait: Seconds that the server wants to be left alone.
        is_final: Whether the same request is told the same again.
    """

    message: str
    code: str
    status: int | None = None
    wait: float = 0.0
    is_final: bool = False


class Sender:
    """Asks one server for every row. Use it once.

    Args:
        http: The server.
        asking: What is asked.
        pace: How much at once.
    """

    def __init__(self, http: Poster, asking: Asking, pace: Pace) -> None:
        self.tally = Tally()
        self._http = http
        self._asking = asking
        self._pace = pace
        self._weight = asking.sequences_per_row
        self._rows_per_request = max(1, min(pace.rows_per_request, pace.concurrency // (2 * self._weight)))
        self._open: dict[BatchKey, _Batch] = {}
        self._ready: deque[_Batch] = deque()
        self._running: dict[asyncio.Task[list[Outcome]], int] = {}
        self._finished: list[asyncio.Task[list[Outcome]]] = []
        self._has_finished = asyncio.Event()
        self._in_flight = 0
        self._num_outstanding = 0
        self._outstanding_bytes = 0
        self._last_answer = time.monotonic()
        self._limit = float(pace.concurrency)
        self._slowed_at = 0.0
        self._random = random.Random()  # noqa: S311 - spreads retries, keeps no secret

    async def outcomes(self, rows: Iterator[Row]) -> AsyncGenerator[list[Outcome], None]:
        """Outcomes in the order of the rows, as soon as they may leave. Closing it early ends every request.

        Args:
            rows: In order, with indices that follow one another.

        Raises:
            SendingError: If there is no use in going on.
        """
        buffer: ReorderBuffer[Outcome] | None = None
        is_end = False
        self._last_answer = time.monotonic()
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
                        self._gather(row)
                self._start(must_empty=is_end or not self._has_room())
                if buffer is not None and (given := buffer.take()):
                    self._num_outstanding -= len(given)
                    self._outstanding_bytes -= sum(outcome.row.num_bytes for outcome in given)
                    yield given
                    continue
                if not self._running:
                    if is_end and not self._num_outstanding:
                        return
                    continue
                # Not asyncio.wait: it looks at all that run, each time that one of them ends.
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

    # What goes together

    def _has_room(self) -> bool:
        bound = max(_AHEAD * self._pace.concurrency // self._weight, 2 * self._rows_per_request)
        return self._num_outstanding < bound and self._outstanding_bytes < _WINDOW_BYTES

    def _gather(self, row: Row) -> None:
        """Put a row to those that it may share a request with."""
        key = self._asking.key(row)
        batch = self._open.get(key)
        if batch is not None and batch.num_bytes + row.num_bytes > _BATCH_BYTES:
            self._ready.append(self._open.pop(key))
            batch = None
        if batch is None:
            batch = self._open[key] = _Batch(key)
        batch.rows.append(row)
        batch.num_bytes += row.num_bytes
        if len(batch.rows) >= self._rows_per_request or not is_shared(key):
            self._ready.append(self._open.pop(key))

    def _start(self, *, must_empty: bool) -> None:
        """Send what there is room for; batches that may still grow only where no more rows can be read now."""
        while True:
            if not self._ready and must_empty and self._open:
                self._ready.append(self._open.pop(next(iter(self._open))))
            if not self._ready:
                return
            weight = len(self._ready[0].rows) * self._weight
            if self._running and self._in_flight + weight > self._limit:
                return
            batch = self._ready.popleft()
            self._in_flight += weight
            task = asyncio.create_task(self._settle(batch.key, batch.rows))
            task.add_done_callback(self._note_finished)
            self._running[task] = weight

    def _note_finished(self, task: asyncio.Task[list[Outcome]]) -> None:
        self._finished.append(task)
        self._has_finished.set()

    # One batch

    async def _settle(self, key: BatchKey, rows: Sequence[Row]) -> list[Outcome]:
        """Ask until every row has its outcome."""
        if len(rows) > self._rows_per_request:  # gathered before it was known that so many are too many
            return await self._halves(key, rows)
        num_tries, num_failures = 0, 0
        while True:
            found = await self._ask(key, rows)
            if not isinstance(found, _Refusal):
                return [Outcome(row, response) for row, response in zip(rows, found, strict=True)]
            if self._is_fatal(key, found):
                raise SendingError(found.message, status=found.status, code=found.code)
            num_failures += found.status is not None and found.status not in _RETRIED
            if found.is_final or num_failures >= _MAX_FAILURES:
                return await self._take_apart(key, rows, found)
            if time.monotonic() - self._last_answer > self._pace.patience:
                raise SendingError(
                    f"no response for {self._pace.patience:g} s; last error: {found.message}",
                    status=found.status,
                    code=found.code,
                )
            self.tally.retries[found.code] += 1
            if found.status in _FULL:
                self._slow_down()
            await asyncio.sleep(self._pause(num_tries, found.wait))
            num_tries += 1

    @staticmethod
    def _is_fatal(key: BatchKey, found: _Refusal) -> bool:
        """Whether every other row would be told the same."""
        if found.status == 404 and key.is_rows_own:
            return False
        return found.status in _FATAL or (found.status is not None and 300 <= found.status < 400)

    async def _take_apart(self, key: BatchKey, rows: Sequence[Row], refusal: _Refusal) -> list[Outcome]:
        """Find the rows that are refused: each half by itself, down to single ones."""
        if len(rows) == 1:
            error: dict[str, Any] = {"message": refusal.message, "code": refusal.code}
            if refusal.status is not None:
                error["status"] = refusal.status
            return [Outcome(rows[0], error=error)]
        outcomes = await self._halves(key, rows)
        if all(outcome.error is None for outcome in outcomes):
            # None of the rows was at fault, so there were too many for the server.
            self._rows_per_request = min(self._rows_per_request, (len(rows) + 1) // 2)
        return outcomes

    async def _halves(self, key: BatchKey, rows: Sequence[Row]) -> list[Outcome]:
        middle = len(rows) // 2
        return await self._settle(key, rows[:middle]) + await self._settle(key, rows[middle:])

    def _slow_down(self) -> None:
        """Leave a full server more room: at most once a second, for its refusals come many at a time."""
        now = time.monotonic()
        if now - self._slowed_at > 1.0:
            self._slowed_at = now
            self._limit = max(self._limit * _SLOWER, float(self._weight))

    def _speed_up(self, num_rows: int) -> None:
        self._limit = min(self._limit + _FASTER * num_rows * self._weight, float(self._pace.concurrency))

    def _pause(self, num_tries: int, asked: float) -> float:
        """Seconds until the next try: twice as long each time, spread, and never less than the server asked for."""
        most = min(_BACKOFF_SECONDS * 2.0 ** min(num_tries, 10), _MAX_BACKOFF_SECONDS)
        return asked + self._random.uniform(0.5, 1.0) * most

    async def _ask(self, key: BatchKey, rows: Sequence[Row]) -> list[dict[str, Any]] | _Refusal:
        self.tally.requests += 1
        content = json.dumps(self._asking.body(key, rows), ensure_ascii=False).encode()
        try:
            async with asyncio.timeout(self._pace.timeout):
                response = await self._http.post(key.path, content)
        except TimeoutError:
            return _Refusal(f"no answer within {self._pace.timeout:g} s", "timeout")
        except NoAnswerError as error:
            return _Refusal(f"{self._http.base_url} cannot be reached: {error}", "unreachable")
        if not 200 <= response.status < 300:
            return _refusal(response, self._http.base_url + key.path)
        self._last_answer = time.monotonic()
        self._speed_up(len(rows))
        try:
            reply = json.loads(response.content)
            found = responses(key, reply, response.headers.get(_SERVED_BY), len(rows))
            usage = reply["usage"]
            self.tally.prompt_tokens += usage["prompt_tokens"]
            self.tally.completion_tokens += usage["completion_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise SendingError(
                f"{self._http.base_url}{key.path}: {error}: is this a Prelude server?",
                status=None,
                code="not_prelude",
            ) from error
        return found


def _refusal(response: Response, url: str) -> _Refusal:
    status = response.status
    try:
        error: Mapping[str, Any] = json.loads(response.content)["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        message, code = f"{url} answered {status}: is this a Prelude server?", "not_prelude"
    is_final = 400 <= status < 500 and status not in _RETRIED
    is_final = is_final or response.headers.get("x-should-retry") == "false"
    return _Refusal(message, code, status, _wait_of(response.headers), is_final)


def _wait_of(headers: Mapping[str, str]) -> float:
    """What ``retry-after-ms`` or ``Retry-After`` asks for, bounded; a date is not read."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return min(max(float(headers[name]) * unit, 0.0), 60.0)
        except (KeyError, ValueError):
            continue
    return 0.0
