"""A token bucket that several servers empty together, as one of them knows it."""

from __future__ import annotations

from collections.abc import Callable

MINUTE = 60.0


class CommonBucket:
    """What this server knows of a bucket in the catalog, and what it has to add to it.

    It is one number: the time at which the bucket will be full. Between two exchanges the use of the other servers is
    not known, so together they may take more than the bucket holds. Then it owes that, and is refilled first.

    Args:
        limit: Amount per minute, and capacity.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._full_at: float | None = None
        self._unsent = 0.0

    @property
    def level(self) -> float | None:
        """The current amount, at most ``limit``, negative if it owes; None if it is not known now."""
        if self._full_at is None:
            return None
        return self.limit - max(0.0, self._full_at - self._clock()) * self.limit / MINUTE

    def charge(self, amount: float) -> None:
        """Count what this server took; a negative amount was returned."""
        self._unsent += amount
        if self._full_at is not None:
            self._full_at = max(self._full_at, self._clock()) + amount * MINUTE / self.limit

    def send(self) -> float:
        """Begin an exchange: the amount to add to the catalog."""
        amount, self._unsent = self._unsent, 0.0
        return amount

    def learn(self, seconds: float) -> None:
        """End an exchange.

        Args:
            seconds: Time from now until the bucket is full, with everything that was sent.
        """
        self._full_at = self._clock() + seconds + self._unsent * MINUTE / self.limit

    def forget(self) -> None:
        """An exchange failed. What it sent may have arrived, so it is not sent again: it counts once at most."""
        self._full_at = None
        self._unsent = 0.0
