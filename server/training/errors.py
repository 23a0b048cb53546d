"""Errors of a training.

TrainingError (a ServerError)
├── SettingsError       the settings conflict with each other or with the model
├── RunDirectoryError   the run directory is in use, or holds another run
├── InstabilityError    the loss became NaN or infinite
└── GoldenCheckError    the server's log-probabilities differ from PEFT's
"""

from __future__ import annotations

from server.errors import ServerError


class TrainingError(ServerError):
    """Training cannot start or continue; the message is for the user."""


class SettingsError(TrainingError):
    """The settings conflict with each other or with the model."""


class RunDirectoryError(TrainingError):
    """The run directory is in use, or holds another run."""


class InstabilityError(TrainingError):
    """The loss became NaN or infinite."""


class GoldenCheckError(TrainingError):
    """The server's log-probabilities differ from PEFT's.

    Attributes:
        difference: Largest difference of one token's log-probability, in nats.
        tolerance: Largest difference allowed, in nats.
    """

    def __init__(self, message: str, *, difference: float, tolerance: float) -> None:
        super().__init__(message)
        self.difference = difference
        self.tolerance = tolerance
