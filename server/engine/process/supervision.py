"""Detection of a hung engine process, and the pause before a restart. Pure logic."""

from __future__ import annotations

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0
GOOD_SERVICE_SECONDS = 60.0


class Backoff:
    """Pauses before restarts: doubled each time, reset after a minute of service."""

    def __init__(self) -> None:
        self._next = FIRST_SECONDS

    def served(self, seconds: float) -> None:
        """Record that a process has served for this long."""
        if seconds >= GOOD_SERVICE_SECONDS:
            self._next = FIRST_SECONDS

    def pause(self) -> float:
        """Seconds to wait before the next attempt."""
        seconds = self._next
        self._next = min(2 * seconds, LONGEST_SECONDS)
        return seconds


class StepWatch:
    """Detects a hung step.

    A process is busy while it has a step to do or unread messages. Time is counted in polls, not by the clock, so a
    suspended server does not blame the engine.

    Args:
        timeout_seconds: How long a busy process may report nothing.
        interval_seconds: Time between polls.
    """

    def __init__(self, timeout_seconds: float, interval_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._interval = interval_seconds
        self._num_sent = 0
        self._is_busy = False
        self._silent_seconds = 0.0

    def sent(self) -> None:
        """Record a message to the process."""
        self._num_sent += 1
        if not self._is_busy:
            self._is_busy = True
            self._silent_seconds = 0.0

    def stepped(self, *, num_received: int, has_work: bool) -> None:
        """Record a step that the process reports.

        Args:
            num_received: Messages that the process has received since its start.
            has_work: Whether another step starts at once.
        """
        self._is_busy = has_work or num_received < self._num_sent
        self._silent_seconds = 0.0

    def poll(self) -> bool:
        """Call this once per interval; returns whether the process is hung."""
        if not self._is_busy:
            return False
        self._silent_seconds += self._interval
        return self._silent_seconds > self._timeout
