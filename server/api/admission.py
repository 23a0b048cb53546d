"""Admission permits: overload is rejected on arrival, not queued without limit."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_store.types import SHARED
from server.errors import InvalidRequestError, OverloadedError, WaitTimeoutError

_NUM_BEGUN = 64
_MIN_BEGUN = 8
"""Minimum number of started sequences before a queue-speed estimate is given."""

SOONEST_SECONDS = 1.0
LATEST_SECONDS = 60.0
"""Bounds of ``Retry-After``: no immediate retry, and no longer than clients wait."""


class Permits:
    """The permits of one request; each sequence releases its permit when it ends."""

    def __init__(self, admission: Admission, count: int, tenant: str, *, waits: bool) -> None:
        self._admission = admission
        self._count = count
        self._tenant = tenant
        self._num_waiting = 0
        self._retry_after: float | None = None
        if waits:
            self._wait(count)

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the request may be repeated (``Admission.retry_after``), computed once per request."""
        if self._retry_after is None:
            self._retry_after = self._admission.retry_after(self._tenant)
        return self._retry_after

    def begin(self, num: int = 1) -> None:
        """Note that ``num`` sequences have their first output."""
        if num > self._num_waiting:
            raise RuntimeError("more sequences began than waited")
        for _ in range(num):
            self._wait(-1)
            self._admission.note_begun()

    def release(self, num: int = 1, *, has_begun: bool) -> None:
        """Release the permits of ``num`` sequences that ended, with or without an output."""
        if num > self._count:
            raise RuntimeError("more permits were given back than taken")
        self._count -= num
        self._admission.num_in_use -= num
        if not has_begun:
            self._wait(-num)

    def release_all(self) -> None:
        """Release the remaining permits."""
        self._admission.num_in_use -= self._count
        self._count = 0
        self._wait(-self._num_waiting)

    def _wait(self, change: int) -> None:
        if change:
            self._num_waiting += change
            self._admission.note_waiting(self._tenant, change)


class Admission:
    """Counts the admitted sequences. Used on the event loop only, so it needs no lock.

    Attributes:
        capacity: Maximum number of admitted sequences, running and waiting.
        num_in_use: Number of admitted sequences.

    Args:
        capacity: Maximum number of admitted sequences.
        clock: A monotonic clock, in seconds.
        between: Draws a random number between two others.
    """

    def __init__(
        self,
        capacity: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        between: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.capacity = capacity
        self.num_in_use = 0
        self._clock = clock
        self._between = between
        self._waiting: Counter[str] = Counter()
        self._begun: deque[float] = deque(maxlen=_NUM_BEGUN)
        self._turns: dict[str, float] = {}
        """Per tenant, the latest retry time given to a rejected client; removed when the tenant's queue is empty."""

    def expected_wait(self, tenant: str) -> float:
        """Estimated seconds until a new sequence of this tenant starts; 0 if there is no estimate.

        The scheduler serves tenants in turn. So the estimate is the length of the tenant's own queue, divided by the
        tenant's share of the rate at which sequences start.
        """
        pace = self._pace(self._clock())
        return 0.0 if pace is None else self._waiting[tenant] * pace

    def retry_after(self, tenant: str) -> float | None:
        """Seconds after which a client that is rejected now may retry; None if no rate is known.

        Rejected clients get different times: the first when all waiting sequences have started, the next ones at the
        rate at which sequences start. So they do not all retry at once, and find a free permit. Times later than
        ``LATEST_SECONDS`` are drawn at random from the second half of that period.
        """
        now = self._clock()
        pace = self._pace(now)
        if pace is None or not self._waiting[tenant]:
            return None
        first = now + max(SOONEST_SECONDS, self._waiting[tenant] * pace)
        turn = max(first, self._turns.get(tenant, 0.0) + pace)
        if turn - now > LATEST_SECONDS:
            return self._between(LATEST_SECONDS / 2, LATEST_SECONDS)
        self._turns[tenant] = turn
        return turn - now

    def _pace(self, now: float) -> float | None:
        """Seconds between the starts of two sequences of a tenant; None if not known."""
        if len(self._begun) < _MIN_BEGUN:
            return None
        return len(self._waiting) * (now - self._begun[0]) / len(self._begun)

    def check(self, tenant: str, timeout: float | None, *, priority: int = 0) -> None:
        """Check that another sequence may be admitted, before any work is done for it.

        Args:
            tenant: The tenant of the sequence.
            timeout: Seconds in which it must start; None is no limit.
            priority: Negative is more urgent; such a sequence overtakes the others and is always admitted.

        Raises:
            OverloadedError: If the server is full.
            WaitTimeoutError: If it would start too late.
        """
        if priority < 0 or self.is_open(tenant, timeout):
            return
        retry_after = self.retry_after(tenant)
        if self.num_in_use >= self.capacity:
            raise OverloadedError(
                f"the server is full: all {self.capacity} places are taken", retry_after=retry_after
            )
        raise WaitTimeoutError(
            f"the request would wait about {self.expected_wait(tenant):.1f} seconds in the queue, longer than its "
            f"timeout of {timeout:g} seconds; try again later",
            retry_after=retry_after,
        )

    def check_count(self, count: int, *, param: str) -> None:
        """Check that this number of sequences can be admitted together.

        Raises:
            InvalidRequestError: If not.
        """
        if count > self.capacity:
            raise InvalidRequestError(
                f"{param}: {count} sequences are more than this server's capacity of {self.capacity}",
                param=param,
            )

    def is_open(self, tenant: str, timeout: float | None) -> bool:
        """Whether ``check`` admits another sequence that is not urgent."""
        return self.num_in_use < self.capacity and (timeout is None or self.expected_wait(tenant) <= timeout)

    def note_waiting(self, tenant: str, change: int) -> None:
        """Add to the number of a tenant's waiting sequences; the rate is reset when its queue is empty."""
        self._waiting[tenant] += change
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._turns.pop(tenant, None)
            if not self._waiting:
                self._begun.clear()

    def note_begun(self) -> None:
        """Note that a sequence has started."""
        if self._waiting:
            self._begun.append(self._clock())

    @contextmanager
    def permits(
        self, count: int, *, tenant: str = SHARED, param: str = "prompt", waits: bool = True
    ) -> Iterator[Permits]:
        """Take a permit for each of a request's sequences, all or none, until the block ends.

        Args:
            count: Number of permits.
            tenant: The tenant of the request.
            param: The request field that sets the number of sequences.
            waits: Whether the sequences wait in the tenant's queue, and so count in the estimates of its speed.

        Raises:
            InvalidRequestError: If ``count`` exceeds the capacity.
            OverloadedError: If too few permits are free.
        """
        self.check_count(count, param=param)
        if self.num_in_use + count > self.capacity:
            raise OverloadedError(
                f"the server is full: {self.num_in_use} of {self.capacity} places are taken and {count} are needed",
                retry_after=self.retry_after(tenant),
            )
        self.num_in_use += count
        permits = Permits(self, count, tenant, waits=waits)
        try:
            yield permits
        finally:
            permits.release_all()
