"""When an engine process is taken for stuck, and how long to wait before the next one is started. Pure logic."""

from __future__ import annotations

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0
GOOD_SERVICE_SECONDS = 60.0


class Backoff:
    """Pauses before restarts: each twice the one before, from the start again after a minute of good service."""

    def __init__(self) -> None:
        self._next = FIRST_SECONDS

    def served(self, seconds: float) -> None:
        """A process has served for this long."""
        if seconds >= GOOD_SERVICE_SECONDS:
            self._next = FIRST_SECONDS

    def pause(self) -> float:
        """Seconds to wait before the next attempt."""
        seconds = self._next
        self._next = min(2 * seconds, LONGEST_SECONDS)
        return seconds


class StepWatch:
    """Tells a step that does not end.

    A process is busy while it has a step to do, or has not taken all that it was sent. Time is counted by looks, not
    read from a clock: a server that was itself held up finds in the next look what has arrived meanwhile.

    Args:
        timeout_seconds: How long a busy process may report nothing.
        interval_seconds: Between two looks.
    """

    def __init__(self, timeout_seconds: float, interval_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._interval = interval_seconds
        self._num_sent = 0
        self._is_busy = False
        self._silent_seconds = 0.0

    def sent(self) -> None:
        """The process was sent a message."""
        self._num_sent += 1
        if not self._is_busy:
            self._is_busy = True
            self._silent_seconds = 0.0

    def stepped(self, *, num_received: int, has_work: bool) -> None:
        """The process reports a step.

        Args:
            num_received: Messages that it has taken since its start.
            has_work: Whether it goes on with another step at once.
        """
        self._is_busy = has_work or num_received < self._num_sent
        self._silent_seconds = 0.0

    def look(self) -> bool:
        """Called every interval; whether the process is stuck."""
        if not self._is_busy:
            return False
        self._silent_seconds += self._interval
        return self._silent_seconds > self._timeout
