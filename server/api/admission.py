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
"""Bounds of ``Retry-After``: not at once, and no longer than clients wait."""


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
    """Counts the sequences in the server. Used on the event loop only, so it needs no lock.

    Attributes:
        capacity: Sequences that may be in the server at once, running and waiting.
        num_in_use: Sequences that are.

    Args:
        capacity: Maximum number of admitted sequences.
        clock: Seconds that never go back.
        between: Draws a number between two others.
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
        """The latest retry time given to a rejected client, per tenant; removed with the tenant's queue."""

    def expected_wait(self, tenant: str) -> float:
        """Seconds that a sequence of this tenant would wait to begin; 0 where that is not known.

        Turns go from tenant to tenant, so what counts is the tenant's own queue, at its share of the rate at which
        sequences begin.
        """
        pace = self._pace(self._clock())
        return 0.0 if pace is None else self._waiting[tenant] * pace

    def retry_after(self, tenant: str) -> float | None:
        """Seconds after which a client that is refused now may come again; None where no rate is known.

        Each gets a turn of its own: the first when all that wait now have begun, the others one after the other, as
        fast as sequences begin. So they do not come back all at once, and what comes back finds a place. Whose turn
        would come after ``LATEST_SECONDS`` gets any time in the second half of them.
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
        """Seconds from one beginning of a tenant's sequences to the next; None where that is not known."""
        if len(self._begun) < _MIN_BEGUN:
            return None
        return len(self._waiting) * (now - self._begun[0]) / len(self._begun)

    def check(self, tenant: str, timeout: float | None, *, priority: int = 0) -> None:
        """Return if another sequence may come in; asked before any work is done for it.

        Args:
            tenant: Whose it is.
            timeout: Seconds in which it has to begin; None is no limit.
            priority: Negative is more urgent; such a sequence does not wait with the others and always passes.

        Raises:
            OverloadedError: If the server is full.
            WaitTimeoutError: If its turn would come too late.
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
        """Whether ``check`` would let another sequence in, which is not urgent."""
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
        """A sequence has begun."""
        if self._waiting:
            self._begun.append(self._clock())

    @contextmanager
    def permits(
        self, count: int, *, tenant: str = SHARED, param: str = "prompt", waits: bool = True
    ) -> Iterator[Permits]:
        """Take a permit for each of a request's sequences, all or none, until the block ends.

        Args:
            count: How many.
            tenant: Whose they are.
            param: The request field that sets the number of sequences.
            waits: Whether they wait for their turn with the tenant's others, which how long that takes is told by.

        Raises:
            InvalidRequestError: If that many could never be admitted together.
            OverloadedError: If not enough are free now.
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
