"""Pictures of the batch while somebody watches: the lease in the engine process, the newest picture in the API's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from server.engine.messages import BatchPicture, Watch
from server.errors import EngineNotReadyError

LEASE_SECONDS = 3.0
"""How long the engine takes pictures after the last ``Watch``."""

RENEW_SECONDS = 1.0
"""How often a watcher renews the lease."""

PICTURE_SECONDS = 0.2
"""Minimum interval between two pictures."""

_PATIENCE_SECONDS = 10.0
"""How long a watcher waits for the first picture, which comes after the current step."""


class PictureLease:
    """Takes pictures in the engine process while its lease lasts; otherwise each step costs one comparison.

    Args:
        take: Takes and sends a picture.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, take: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._until = 0.0
        self._next = 0.0
        self._was_busy = False

    def renew(self, seconds: float) -> None:
        """Extend the lease, and take a picture now, because an idle engine takes no other."""
        self._until = self._clock() + seconds
        self._picture()

    def stepped(self, *, has_work: bool) -> None:
        """Take a picture after a step if one is due; always after the last step before the engine is idle."""
        if not self._until:
            return
        now = self._clock()
        if now >= self._until:
            self._until = 0.0
        elif now >= self._next or (self._was_busy and not has_work):
            self._picture()
        self._was_busy = has_work

    def _picture(self) -> None:
        self._next = self._clock() + PICTURE_SECONDS
        self._take()


class EngineView:
    """The newest picture in the API process, and the renewal of the lease.

    Args:
        send: Sends a message to the engine process.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, send: Callable[[Watch], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._renewed_at: float | None = None
        self._picture: BatchPicture | None = None
        self._changed = asyncio.Event()

    async def look(self) -> BatchPicture:
        """The batch, at most ``PICTURE_SECONDS`` and one step ago.

        Raises:
            EngineNotReadyError: If no picture arrives.
        """
        now = self._clock()
        if self._renewed_at is None or now - self._renewed_at >= RENEW_SECONDS:
            if self._renewed_at is None or now - self._renewed_at >= LEASE_SECONDS:
                self._picture = None  # it was taken under an earlier lease
            self._renewed_at = now
            self._send(Watch(LEASE_SECONDS))
        while self._picture is None:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), _PATIENCE_SECONDS)
            except TimeoutError:
                raise EngineNotReadyError("the engine did not say what it runs") from None
            if self._renewed_at is None:
                raise EngineNotReadyError("the engine ended")
        return self._picture

    def receive(self, picture: BatchPicture) -> None:
        """Take a new picture from the engine process."""
        self._picture = picture
        self._changed.set()

    def reset(self) -> None:
        """Forget the engine process, which has ended."""
        self._renewed_at = self._picture = None
        self._changed.set()
