"""One bulk run: send the rows of a file to a server and write the answers to another file."""

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
    """More rows have failed than ``max_errors``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The settings of a run.

    Attributes:
        source: The input file.
        num_rows: Number of rows in it.
        template: The requests to send.
        limits: How much is sent at once.
        max_errors: Maximum number of failed rows, including those of earlier starts; None: no limit.
    """

    source: Path
    num_rows: int
    template: RequestTemplate
    limits: SendLimits
    max_errors: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a run.

    Attributes:
        summary: The summary.
        reason: Why the run stopped early; empty if it is complete.
        failure: The error that stopped the run, if one did.
    """

    summary: Summary
    reason: str = ""
    failure: SenderError | None = None


async def run(job: Job, http: Transport, journal: Journal, on_rows: OnRows) -> Finished:
    """Answer the remaining rows. SIGINT and SIGTERM stop the run; written rows are kept.

    Raises:
        JournalError: If the output cannot be written.
        OSError: If the input cannot be read.
    """
    watch = Stopwatch()
    before = journal.written.num_rows
    sender = Sender(http, job.template, job.limits)
    state: State = "complete"
    reason, failure = "", None
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("not called from a task")
    with _cancelled_by_signals(task) as signals:
        try:
            await _copy(job, sender, journal, on_rows)
            if journal.written.num_rows != job.num_rows:
                state, reason = "gave_up", f"{job.source} had {job.num_rows} rows and was changed during the run"
        except _EnoughError:
            state, reason = "too_many_errors", f"more than {job.max_errors} rows have failed (--max-errors)"
        except SenderError as error:
            state, reason, failure = "gave_up", str(error), error
        except asyncio.CancelledError:
            if not signals:
                raise
            task.uncancel()
            state, reason = "interrupted", f"stopped by {signals[0].name}"
    journal.close()
    written, tally, seconds = journal.written, sender.tally, watch.seconds
    summary = Summary(
        state=state,
        model=job.template.model if isinstance(job.template.model, str) else ",".join(job.template.model),
        output=str(journal.path),
        rows=job.num_rows,
        rows_done=written.num_rows,
        rows_before=before,
        errors=written.num_errors,
        errors_by_code=dict(written.codes),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        requests=tally.requests,
        retries=dict(tally.retries),
        seconds=round(seconds, 3),
        rows_per_second=round((written.num_rows - before) / seconds, 3) if seconds else 0.0,
    )
    return Finished(summary, reason, failure)


async def _copy(job: Job, sender: Sender, journal: Journal, on_rows: OnRows) -> None:
    rows = read_rows(job.source, skip=journal.written.num_rows)
    stream: AsyncGenerator[list[Outcome], None] = sender.outcomes(rows)
    async with aclosing(stream):
        async for outcomes in stream:
            allowed = _allowed(outcomes, job.max_errors, journal.written.num_errors)
            journal.write([output_line(outcome) for outcome in allowed])
            on_rows(len(allowed), journal.written.num_errors)
            if len(allowed) < len(outcomes):
                raise _EnoughError
            if journal.is_sync_due:
                await asyncio.to_thread(journal.sync)


def _allowed(outcomes: list[Outcome], max_errors: int | None, num_errors: int) -> list[Outcome]:
    """The outcomes before the first error beyond ``max_errors``."""
    if max_errors is None:
        return outcomes
    for place, outcome in enumerate(outcomes):
        num_errors += outcome.error is not None
        if num_errors > max_errors:
            return outcomes[:place]
    return outcomes


def output_line(outcome: Outcome) -> tuple[bytes, Mapping[str, Any] | None]:
    """A line of the output (the input's fields, then the response or the error), and the error if any."""
    row = outcome.row
    error = None if outcome.error is None else {**outcome.error, "line": row.line}
    added: dict[str, Any] = {"response": outcome.response} if error is None else {"error": error}
    # Extend the input line if possible, instead of encoding its fields again. A carriage return between fields is
    # valid JSON, but some readers end a line there.
    if row.source and row.fields and not RESERVED & row.fields.keys() and b"\r" not in row.source:
        return row.source[:-1].rstrip() + b", " + _encoded(added)[1:] + b"\n", error
    return _encoded({**row.fields, **added}) + b"\n", error


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def _encoded(value: Mapping[str, Any]) -> bytes:
    # A server may answer with half of a surrogate pair. UTF-8 cannot encode it, so it is written as a JSON escape.
    return _ENCODER.encode(value).encode(errors="backslashreplace")


@contextmanager
def _cancelled_by_signals(task: asyncio.Task[Any]) -> Iterator[list[signal.Signals]]:
    """Cancel a task on the first SIGINT or SIGTERM; a second one ends the process."""
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
        pass  # signals can be handled in the main thread only
    try:
        yield seen
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
