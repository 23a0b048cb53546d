"""What ends a training.

TrainingError (a ServerError)
├── SettingsError       the settings do not go together, or not with the model
├── RunDirectoryError   the run directory is in use, or is another run's
├── InstabilityError    the loss is not a number any more
└── GoldenCheckError    the server's answers are not PEFT's
"""

from __future__ import annotations

from server.errors import ServerError


class TrainingError(ServerError):
    """Training cannot begin or go on; the message is for people."""


class SettingsError(TrainingError):
    """The settings do not go together, or not with the model."""


class RunDirectoryError(TrainingError):
    """The run directory is in use, or holds another run."""


class InstabilityError(TrainingError):
    """The loss became NaN or infinite."""


class GoldenCheckError(TrainingError):
    """The server's log-probabilities are not those of PEFT.

    Attributes:
        difference: The largest difference of one token's log-probability, in nats.
        tolerance: What was allowed.
    """

    def __init__(self, message: str, *, difference: float, tolerance: float) -> None:
        super().__init__(message)
        self.difference = difference
        self.tolerance = tolerance
