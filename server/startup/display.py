"""Shows the stages of a start, and at its end what is served."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from server import logs

if TYPE_CHECKING:
    from server.startup.summary import Summary

logger = logging.getLogger(__name__)


class StartDisplay:
    """Shows a start on a console, or in the log.

    On a terminal, one line with a spinner shows the stage and the time; elsewhere, each stage is a line. Leaving the
    context ends the spinner, also after a failure.

    Args:
        console: Where to show it; None for the log, at level INFO.

    Attributes:
        url: Where the server listens; set as soon as it is known.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.url: str | None = None
        self._console = console
        self._started = time.monotonic()
        self._is_shown = threading.Event()
        self._progress: Progress | None = None
        if console is not None and console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task("starting")

    def __enter__(self) -> StartDisplay:
        """Show that the server starts."""
        if self._progress is not None:
            self._progress.start()
        if self._console is not None:
            self.enter("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the spinner."""
        self.end()

    def enter(self, stage: str) -> None:
        """Show the beginning of a stage."""
        if self._progress is not None:
            self._progress.update(self._task, description=stage)
        elif self._console is not None:
            self._print(f"{stage} …")
        else:
            logger.info("%s", stage)

    def advance(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is, on a terminal."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"{stage}: {done} of {total}")

    def end(self) -> None:
        """End the spinner, if there is one. May be called twice."""
        if self._progress is not None:
            self._progress.stop()

    def show(self, summary: Summary) -> None:
        """End the spinner, and show what is served."""
        self.end()
        if self._console is not None:
            self._print(f"Ready after {time.monotonic() - self._started:.1f} s")
            for line in summary.lines(self.url):
                self._print(f"  {line}")
        elif not logs.is_json():
            for line in summary.lines(self.url):
                logger.info("%s", line)
        self._is_shown.set()

    def wait_until_shown(self, seconds: float) -> None:
        """Wait in another thread until it is shown what is served, or this time has passed."""
        self._is_shown.wait(seconds)

    def _print(self, line: str) -> None:
        if self._console is not None:
            # Rich ends the process when its output is closed; a server that somebody has stopped to watch goes on.
            with suppress(SystemExit):
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
