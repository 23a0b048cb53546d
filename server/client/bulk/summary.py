"""The summary and the progress bar of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

State = Literal["complete", "interrupted", "too_many_errors", "gave_up"]

OnRows = Callable[[int, int], None]
"""Called with the number of new rows written, and the number of errors so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result of a run. Tokens, requests, retries and times count since the last start or resume.

    Attributes:
        model: The model for rows that name none.
        output: Path of the output.
        rows: Rows in the input.
        rows_done: Rows in the output.
        rows_before: Rows that were in the output at the start.
        errors: Rows in the output with an error.
        errors_by_code: The same by code.
        prompt_tokens: Text tokens.
        completion_tokens: Generated tokens.
        retries: Requests that were sent again, by reason.
    """

    state: State
    model: str
    output: str
    rows: int
    rows_done: int
    rows_before: int
    errors: int
    errors_by_code: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    requests: int
    retries: dict[str, int]
    seconds: float
    rows_per_second: float

    @property
    def as_json(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        return {"object": "bulk.summary", **asdict(self)}

    @property
    def lines(self) -> Iterator[str]:
        """The summary as lines of text."""
        done = f"{self.rows_done:,} of {self.rows:,} rows" if self.rows_done < self.rows else f"{self.rows:,} rows"
        before = f", {self.rows_before:,} of them from earlier starts" if self.rows_before else ""
        yield f"{self.output}: {done}{before}, answered by {self.model}"
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(self.errors_by_code.items()))
        yield f"errors: {self.errors:,}" + (f" ({codes})" if codes else "")
        yield f"tokens: {self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"
        retries = ", ".join(f"{code} {count:,}" for code, count in sorted(self.retries.items()))
        yield f"requests: {self.requests:,}" + (f", retries: {retries}" if retries else "")
        yield f"{self.seconds:.1f} s, {self.rows_per_second:,.1f} rows/s"


class _Rate(ProgressColumn):
    """Rows per second since the start."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first

    def render(self, task: Task) -> Text:
        """The rate, or a dash while it is unknown."""
        elapsed = task.elapsed
        if not elapsed or task.completed <= self._first:
            return Text("- rows/s")
        return Text(f"{(task.completed - self._first) / elapsed:,.0f} rows/s")


@contextmanager
def progress_bar(what: str, total: int, done: int) -> Iterator[OnRows]:
    """A progress bar on standard error, if that is a terminal, with rate, time left and errors."""
    if not sys.stderr.isatty():
        yield lambda _rows, _errors: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(done),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[errors]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, errors="")

        def on_rows(rows: int, errors: int) -> None:
            progress.update(task, advance=rows, errors=f"{errors:,} errors" if errors else "")

        yield on_rows


class Stopwatch:
    """Measures the time since it was created."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Elapsed seconds."""
        return time.monotonic() - self._started
