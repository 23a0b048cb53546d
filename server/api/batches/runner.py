"""Runs batches: every line of a file becomes a request of its caller, in the service tier ``batch``.

Batches of one tenant run one after another, those of different tenants beside each other. A server that stops leaves
its batches where they are, and goes on with them when it starts again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from prompt_store.files.strict_json import parse_json
from server.api.batches.storage import BatchRecord, BatchStorage
from server.api.keys.callers import ANYBODY, Caller
from server.api.keys.in_process import Reply, post_until_answered
from server.api.keys.keys import ApiKeys
from server.api.task_group import task_group
from server.config import Settings
from server.errors import NotFoundError

logger = logging.getLogger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/classify", "/v1/completions")
MAX_ROWS = 50_000
MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_FAULTS = 20
MAX_ID_CHARS = 512

_MAX_CONCURRENCY = 64
"""Requests of one batch at once: as many as the engine computes of the tier together, or more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a batch."""

    custom_id: str
    body: dict[str, Any]


class _InvalidBatchError(Exception):
    def __init__(self, faults: list[tuple[str, str, int | None]]) -> None:
        super().__init__(faults[0][1])
        self.faults = faults


class BatchRunner:
    """Runs the batches of a server.

    Args:
        storage: Files and batches.
        caller_named: The caller with a key of this name; None if there is none any more.
        concurrency: Requests of one batch at once.
    """

    def __init__(
        self, storage: BatchStorage, *, caller_named: Callable[[str | None], Caller | None], concurrency: int
    ) -> None:
        self.storage = storage
        self._caller_named = caller_named
        self._concurrency = concurrency
        self._app: ASGIApp | None = None
        self._live: dict[str, BatchRecord] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def running(self, app: ASGIApp) -> AsyncIterator[None]:
        """Run batches until the block ends, those of an earlier process first.

        Args:
            app: The application that answers the requests.
        """
        self._app = app
        for record in reversed(await asyncio.to_thread(self.storage.batches, None)):
            if not record.is_over:
                self._start(record)
        try:
            yield
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel("the server stops")
            await asyncio.gather(*tasks, return_exceptions=True)

    async def add(self, record: BatchRecord) -> None:
        """Store a new batch and run it in its turn."""
        await asyncio.to_thread(self.storage.add_batch, record)
        self._start(record)

    def current(self, record: BatchRecord) -> BatchRecord:
        """The newest state of a batch."""
        return self._live.get(record.id, record)

    async def cancel(self, record: BatchRecord) -> BatchRecord:
        """End a batch early, with the answers so far; no effect if it is over."""
        record = self.current(record)
        task = self._tasks.get(record.id)
        if not record.is_over and record.status != "cancelling" and task is not None:
            self._reach(record, "cancelling")
            await asyncio.to_thread(self.storage.save, record)
            task.cancel("cancelled")
        return record

    def _start(self, record: BatchRecord) -> None:
        self._live[record.id] = record
        task = asyncio.create_task(self._run(record), name=f"run {record.id}")
        self._tasks[record.id] = task

        def forget(_: asyncio.Task[None]) -> None:
            self._tasks.pop(record.id, None)
            self._live.pop(record.id, None)

        task.add_done_callback(forget)

    async def _run(self, record: BatchRecord) -> None:
        try:
            if record.status == "cancelling":  # the server stopped in between
                raise asyncio.CancelledError
            async with self._turns.setdefault(record.tenant, asyncio.Lock()):
                async with asyncio.timeout_at(self._deadline(record)):
                    await self._answer_all(record)
            status = "completed"
        except TimeoutError:
            status = "expired"
        except _InvalidBatchError as error:
            record.errors, status = error.faults, "failed"
        except asyncio.CancelledError:
            if record.status != "cancelling":
                return  # the server stops, and goes on when it starts again
            status = "cancelled"
        except Exception:
            logger.exception("batch %s failed", record.id)
            record.errors, status = [("internal_error", "the server could not run the batch", None)], "failed"
        await asyncio.to_thread(self._finish, record, status)

    def _finish(self, record: BatchRecord, status: str) -> None:
        self.storage.publish_results(record)
        self._reach(record, status)
        self.storage.save(record)
        self.storage.forget_growing(record)

    async def _answer_all(self, record: BatchRecord) -> None:
        rows = await asyncio.to_thread(self._rows, record)
        if record.status == "validating":
            self._reach(record, "in_progress")
        record.total = len(rows)
        answered = await asyncio.to_thread(self.storage.answered, record)
        await asyncio.to_thread(self.storage.save, record)
        left = iter([row for row in rows if row.custom_id not in answered])
        async with task_group() as group:
            for _ in range(min(self._concurrency, len(rows))):
                group.create_task(self._answer_some(record, left))
        self._reach(record, "finalizing")

    async def _answer_some(self, record: BatchRecord, left: Iterator[Row]) -> None:
        for row in left:
            caller = self._caller_named(record.key)
            if caller is None or caller.tenant != record.tenant:
                raise _InvalidBatchError([("key_revoked", "the API key of the batch is not valid any more", None)])
            reply = await self._ask(record.endpoint, row, caller)
            line = _line(row, reply)
            await asyncio.shield(asyncio.to_thread(self.storage.append, record, line, is_error=reply.status >= 400))

    async def _ask(self, endpoint: str, row: Row, caller: Caller) -> Reply:
        if self._app is None:
            raise RuntimeError("the runner was not started")
        return await post_until_answered(self._app, endpoint, row.body, caller)

    def _rows(self, record: BatchRecord) -> list[Row]:
        try:
            path = self.storage.content(record.input_file_id, record.tenant)
        except NotFoundError as error:
            raise _InvalidBatchError([("file_not_found", error.message, None)]) from error
        return read_rows(path, record.endpoint)

    def _reach(self, record: BatchRecord, status: str) -> None:
        record.status = status
        record.times[f"{status}_at"] = int(time.time())

    @staticmethod
    def _deadline(record: BatchRecord) -> float:
        return asyncio.get_running_loop().time() + record.expires_at - time.time()


def make_runner(settings: Settings, keys: ApiKeys | None) -> BatchRunner:
    """The runner of a server. Files and batches are on its own disk, also if the store is an object store."""
    return BatchRunner(
        BatchStorage(settings.store.local_path / "batches"),
        caller_named=(lambda _: ANYBODY) if keys is None else keys.named,
        concurrency=max(1, min(_MAX_CONCURRENCY, settings.engine.max_num_seqs)),
    )


def read_rows(path: Path, endpoint: str) -> list[Row]:
    """The requests of a file.

    Raises:
        _InvalidBatchError: With the first faults, if a line is not a request for this endpoint.
    """
    rows: list[Row] = []
    faults: list[tuple[str, str, int | None]] = []
    known: set[str] = set()
    with path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if not data.strip():
                continue
            try:
                row = _row(data, endpoint)
                if row.custom_id in known:
                    raise ValueError(f"the custom_id {row.custom_id[:64]!r} is used twice")
                known.add(row.custom_id)
                rows.append(row)
            except ValueError as error:
                faults.append(("invalid_line", str(error), number))
            if len(rows) > MAX_ROWS:
                faults.append(("too_many_requests", f"the file has more than {MAX_ROWS} requests", None))
            if len(faults) >= MAX_FAULTS or len(rows) > MAX_ROWS or len(data) > MAX_LINE_BYTES:
                break
    if not rows and not faults:
        faults.append(("empty_file", "the file has no requests", None))
    if faults:
        raise _InvalidBatchError(faults)
    return rows


def _row(data: bytes, endpoint: str) -> Row:
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = parse_json(data.decode(), max_depth=64)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    name, body = value.get("custom_id"), value.get("body")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_CHARS:
        raise ValueError(f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters")
    if value.get("method", "POST") != "POST":
        raise ValueError("method must be POST")
    if value.get("url", endpoint) != endpoint:
        raise ValueError(f"url must be the endpoint of the batch, {endpoint}")
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    if body.get("stream"):
        raise ValueError("body.stream must not be true")
    return Row(name, body)


def _line(row: Row, reply: Reply) -> dict[str, Any]:
    try:
        body = json.loads(reply.body)
    except ValueError:
        body = None
    request_id = reply.headers.get("x-request-id", "")
    response = {"status_code": reply.status, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{request_id}", "custom_id": row.custom_id, "response": response, "error": None}
