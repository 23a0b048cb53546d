"""Continue a training that diverged: from its last good state, at half the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from server.training.errors import InstabilityError
from server.training.run_directory import RunDirectory

MAX_HALVINGS = 3
"""Number of times that the rate is halved; after that the training ends."""


class Attempt(Protocol):
    """The part of the trainer that is used."""

    @property
    def best_step(self) -> int | None:
        """Step of the best state; 0 for the untrained one, None without held-out rows."""
        ...

    @property
    def best_loss(self) -> float | None:
        """Held-out loss of the best state; None without held-out rows."""
        ...

    def start(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the beginning.

        Raises:
            InstabilityError: If the training diverges.
        """
        ...


A = TypeVar("A", bound=Attempt)


def halvings_so_far(directory: RunDirectory) -> int:
    """How often the rate of the run in a directory was halved."""
    return max((entry["halvings"] for entry in directory.records() if "halvings" in entry), default=0)


def train_steadily(
    make: Callable[[int], A], directory: RunDirectory, checkpoint: Path | None, warn: Callable[[str], None]
) -> A:
    """Train, and after each divergence go back to the best state and halve the rate; returns the last trainer.

    A run that still diverges after ``MAX_HALVINGS`` ends with its best state, unless that is the untrained one.

    Args:
        make: Makes a trainer of the initial state, with the rate halved this many times.
        directory: The directory of the run.
        checkpoint: Where to begin; None for the first step.
        warn: Called with a warning for each divergence.

    Raises:
        InstabilityError: If the training diverges too often, and no state is better than the untrained one.
    """
    halvings = halvings_so_far(directory)
    while True:
        trainer = make(halvings)
        try:
            trainer.start(checkpoint)
            return trainer
        except InstabilityError as error:
            if halvings >= MAX_HALVINGS:
                if not trainer.best_step:
                    raise
                warn(f"{error} The training ends here, with the best state, of step {trainer.best_step}")
                return trainer
            halvings += 1
            checkpoint = directory.checkpoint_of(trainer.best_step)
            step = 0 if checkpoint is None else directory.step_of(checkpoint)
            directory.truncate_records(step)
            directory.record({"step": step, "halvings": halvings})
            warn(f"{error} It continues from step {step} at half the rate")
