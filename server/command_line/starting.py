"""How ``serve`` and ``demo`` start: the engine before the server is imported, and where the start is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from server.config import EngineSettings
from server.demo import Exhibit
from server.demo.real.model import REAL, converted, weights
from server.startup.display import StartDisplay
from server.startup.own_process import hide_torch

if TYPE_CHECKING:
    from server.engine.process.started_process import StartedProcess

OWN_PROCESS = object()
"""The context's object if the command was started by a shell, and not inside another program."""


def terminal_for_log(values: dict[str, Any]) -> Console | None:
    """The terminal that the log goes to; None if it goes elsewhere, is for programs, or leaves out messages."""
    console = Console(stderr=True)
    is_shown = values["log_format"] == "text" and values["log_level"] in {"DEBUG", "INFO"}
    return console if console.is_terminal and is_shown else None


@contextmanager
def started_early(context: typer.Context, settings: EngineSettings) -> Iterator[StartedProcess | None]:
    """Start the engine's process, which imports torch, beside the imports of the server, which needs none.

    Only if the command has this process to itself.
    """
    if context.obj is not OWN_PROCESS:
        yield None
        return
    from server.engine.process.started_process import StartedProcess  # noqa: PLC0415 - client commands need none

    hide_torch()
    with StartedProcess(settings) as process:
        yield process


def real_exhibit(display: StartDisplay) -> tuple[Path, Exhibit]:
    """The directory of the demo's real model, converted if it is not yet, and what its tour shows.

    Raises:
        ConfigurationError: If it is not installed, or cannot be converted.
    """
    stage = "converting SmolLM2-135M-Instruct, which is kept for the next start"
    path = weights()
    is_shown = False

    def on_tensor(done: int, total: int) -> None:
        nonlocal is_shown
        if not is_shown:
            display.enter(stage)
            is_shown = True
        display.advance(stage, done, total)

    return converted(path, on_tensor=on_tensor), REAL
