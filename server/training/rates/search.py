"""Find a learning rate by short trainings."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace

from server.training.errors import InstabilityError, SettingsError
from server.training.rates.recovery import Attempt
from server.training.run_directory import RunDirectory
from server.training.settings import TrainSettings

SHARE = 0.25
"""Length of a short training, as a share of the steps of the whole one."""

FILE = "search.json"
"""The held-out loss of each rate, in the run directory."""

_FOLDER = "search"
_SPACING = math.sqrt(10.0)


def rates_around(middle: float, count: int) -> list[float]:
    """``count`` rates, a factor of the square root of ten apart, from the middle outwards."""
    powers = [0, *(sign * power for power in range(1, count) for sign in (-1, 1))][:count]
    return [float(f"{middle * _SPACING**power:.3g}") for power in powers]


def find_rate(
    settings: TrainSettings,
    num_steps: int,
    directory: RunDirectory,
    make: Callable[[TrainSettings, RunDirectory], Attempt],
    say: Callable[[str], None],
) -> float:
    """Train with each rate for a share of the steps, from the same initial state; returns the rate of the best loss.

    Results are kept in ``search.json``, so that a resumed search does not repeat them. A rate that diverges counts
    as infinitely bad.

    Args:
        settings: The settings of the whole training; ``search`` is the number of rates.
        num_steps: Its number of steps.
        directory: Its directory; the short trainings use subdirectories, which are deleted.
        make: Makes a trainer of the initial state for settings and a directory.
        say: Called with a line for each rate.

    Raises:
        SettingsError: If the training diverges at every rate.
    """
    steps = max(1, round(SHARE * num_steps))
    losses: dict[str, float | None] = directory.read(FILE) or {}
    for rate in rates_around(settings.rate, settings.search):
        if f"{rate:g}" in losses:
            continue
        folder = directory.path / _FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        short = replace(settings, learning_rate=rate, max_steps=steps, eval_steps=max(1, steps // 2), patience=0)
        trainer = make(short, RunDirectory(folder))
        try:
            trainer.start(None)
            losses[f"{rate:g}"] = trainer.best_loss
        except InstabilityError:
            losses[f"{rate:g}"] = None
        directory.write(FILE, losses)
        shutil.rmtree(folder)
        found = losses[f"{rate:g}"]
        say(f"rate {rate:g}: " + ("diverges" if found is None else f"held-out loss {found:.4f} after {steps} steps"))
    usable = {float(rate): loss for rate, loss in losses.items() if loss is not None}
    if not usable:
        raise SettingsError(f"search: the training diverges at every rate: {', '.join(losses)}")
    return min(usable, key=lambda rate: usable[rate])
