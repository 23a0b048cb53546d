"""One run: rows from a file, through a server, into a file."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.client.bulk.journal import Journal
from server.client.bulk.request_template import RequestTemplate
from server.client.bulk.rows import RESERVED, read_rows
from server.client.bulk.sender import Outcome, Sender, SenderError, SendLimits
from server.client.bulk.summary import OnRows, State, Stopwatch, Summary
from server.client.bulk.transport import Transport


class _EnoughError(Exception):
    """There are more errors than were allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done.

    Attributes:
        source: The input.
        num_rows: Its rows.
        template: The requests to send.
        limits: How much is sent at once.
        max_errors: Rows that may be errors, those of earlier starts included; None is without limit.
    """

    source: Path
    num_rows: int
    template: RequestTemplate
    limits: SendLimits
    max_errors: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended.

    Attributes:
        summary: What came of it.
        reason: Why it did not come to the end, else an empty text.
        failure: What the server said, where that is the reason.
    """

    summary: Summary
    reason: str = ""
    failure: SenderError | None = None


async def run(job: Job, http: Transport, journal: Journal, on_rows: OnRows) -> Finished:
    """Answer what is not answered yet. SIGINT and SIGTERM end it early; what is written stays.

    Raises:
        JournalError: If the output cannot be written.
        OSError: If the input cannot be read.
    """
    watch = Stopwatch()
    before = journal.progress.num_rows
    sender = Sender(http, job.template, job.limits)
    state: State = "complete"
    reason, failure = "", None
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a run is a task")
    with _cancelled_by_signals(task) as signals:
        try:
            await _copy(job, sender, journal, on_rows)
            if journal.progress.num_rows != job.num_rows:
                state, reason = "gave_up", f"{job.source} had {job.num_rows} rows and was changed meanwhile"
        except _EnoughError:
            state, reason = "too_many_errors", f"more than {job.max_errors} rows are errors (--max-errors)"
        except SenderError as error:
            state, reason, failure = "gave_up", str(error), error
        except asyncio.CancelledError:
            if not signals:
                raise
            task.uncancel()
            state, reason = "interrupted", f"stopped by {signals[0].name}"
    journal.close()
    progress, tally, seconds = journal.progress, sender.tally, watch.seconds
    summary = Summary(
        state=state,
        model=job.template.model,
        output=str(journal.path),
        rows=job.num_rows,
        rows_done=progress.num_rows,
        rows_before=before,
        errors=progress.num_errors,
        errors_by_code=dict(progress.codes),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        requests=tally.requests,
        retries=dict(tally.retries),
        seconds=round(seconds, 3),
        rows_per_second=round((progress.num_rows - before) / seconds, 3) if seconds else 0.0,
    )
    return Finished(summary, reason, failure)


async def _copy(job: Job, sender: Sender, journal: Journal, on_rows: OnRows) -> None:
    rows = read_rows(job.source, skip=journal.progress.num_rows)
    outcomes: AsyncGenerator[list[Outcome], None] = sender.outcomes(rows)
    async with aclosing(outcomes):
        async for given in outcomes:
            allowed = _allowed(given, job.max_errors, journal.progress.num_errors)
            journal.write([output_line(outcome) for outcome in allowed])
            on_rows(len(allowed), journal.progress.num_errors)
            if len(allowed) < len(given):
                raise _EnoughError
            if journal.is_sync_due:
                await asyncio.to_thread(journal.sync)


def _allowed(given: list[Outcome], max_errors: int | None, num_errors: int) -> list[Outcome]:
    """Those before the error that is one too many."""
    if max_errors is None:
        return given
    for place, outcome in enumerate(given):
        num_errors += outcome.error is not None
        if num_errors > max_errors:
            return given[:place]
    return given


def output_line(outcome: Outcome) -> tuple[bytes, Mapping[str, Any] | None]:
    """A line of the output, and its error: the input's fields as they stand there, then what has come of the row."""
    row = outcome.row
    error = None if outcome.error is None else {**outcome.error, "line": row.line}
    added: dict[str, Any] = {"response": outcome.response} if error is None else {"error": error}
    # The fields are not encoded anew where the line can be gone on with. A carriage return between two of them is
    # allowed in JSON, but there are readers that end a line at it.
    if row.source and row.fields and not RESERVED & row.fields.keys() and b"\r" not in row.source:
        return row.source[:-1].rstrip() + b", " + _encoded(added)[1:] + b"\n", error
    return _encoded({**row.fields, **added}) + b"\n", error


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def _encoded(value: Mapping[str, Any]) -> bytes:
    # Half of a surrogate pair, which a server may answer, is no UTF-8; the escape of JSON is what replaces it.
    return _ENCODER.encode(value).encode(errors="backslashreplace")


@contextmanager
def _cancelled_by_signals(task: asyncio.Task[Any]) -> Iterator[list[signal.Signals]]:
    """Cancel a task on the first SIGINT or SIGTERM; a second one ends the process as ever."""
    loop, seen = asyncio.get_running_loop(), list[signal.Signals]()

    def on_signal(number: signal.Signals) -> None:
        seen.append(number)
        for other in handled:
            loop.remove_signal_handler(other)
        task.cancel()

    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in handled:
            loop.add_signal_handler(number, on_signal, number)
    except (RuntimeError, ValueError):
        pass  # not the main thread: whoever runs this there has its own way to stop
    try:
        yield seen
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
