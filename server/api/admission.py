"""Admission permits: overload is refused at the door, not queued without end."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_store.types import SHARED
from server.errors import InvalidRequestError, OverloadedError, WaitTimeoutError

_NUM_BEGUN = 64
_MIN_BEGUN = 8
"""Sequences that have to have begun beside a queue before it is told how fast it moves."""


class Permits:
    """The permits of one request; each sequence gives its own back when it ends."""

    def __init__(self, admission: Admission, count: int, tenant: str) -> None:
        self._admission = admission
        self._count = count
        self._tenant = tenant
        self._num_waiting = 0
        self._wait(count)

    def begin(self, num: int = 1) -> None:
        """So many sequences have their first output."""
        for _ in range(min(num, self._num_waiting)):
            self._wait(-1)
            self._admission.note_begun()

    def release(self, num: int = 1) -> None:
        """Give back the permits of so many sequences, which have ended."""
        if num > self._count:
            raise RuntimeError("more permits were given back than taken")
        self._count -= num
        self._admission.num_in_use -= num
        if self._num_waiting > self._count:
            self._wait(self._count - self._num_waiting)

    def release_all(self) -> None:
        """Give back what is left."""
        self.release(self._count)

    def _wait(self, change: int) -> None:
        self._num_waiting += change
        self._admission.note_waiting(self._tenant, change)


class Admission:
    """Counts the sequences in the server. Used on the event loop only, so it needs no lock.

    Attributes:
        capacity: Sequences that may be in the server at once, running and waiting.
        num_in_use: Sequences that are.

    Args:
        capacity: See above.
        clock: Seconds that never go back.
    """

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = capacity
        self.num_in_use = 0
        self._clock = clock
        self._waiting: Counter[str] = Counter()
        self._begun: deque[float] = deque(maxlen=_NUM_BEGUN)

    def expected_wait(self, tenant: str) -> float:
        """Seconds that a sequence of this tenant would wait to begin; 0 where that is not known.

        Turns go from tenant to tenant, so what counts is the tenant's own queue, at its share of the rate at which
        sequences begin.
        """
        if not self._waiting[tenant] or len(self._begun) < _MIN_BEGUN:
            return 0.0
        return self._waiting[tenant] * len(self._waiting) * (self._clock() - self._begun[0]) / len(self._begun)

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
        if priority < 0:
            return
        if self.num_in_use >= self.capacity:
            raise OverloadedError(f"the server is full: all of its {self.capacity} places are taken")
        wait = self.expected_wait(tenant)
        if timeout is not None and wait > timeout:
            raise WaitTimeoutError(
                f"the request would wait about {wait:.1f} seconds for its turn, and {timeout:g} are allowed; "
                "try again later"
            )

    def note_waiting(self, tenant: str, change: int) -> None:
        """So many more of a tenant's sequences wait; the rate is that of a queue, so it is forgotten with it."""
        self._waiting[tenant] += change
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            if not self._waiting:
                self._begun.clear()

    def note_begun(self) -> None:
        """A sequence has begun."""
        if self._waiting:
            self._begun.append(self._clock())

    @contextmanager
    def permits(self, count: int, *, tenant: str = SHARED, param: str = "prompt") -> Iterator[Permits]:
        """Take a permit for each of a request's sequences, all or none, until the block ends.

        Args:
            count: How many.
            tenant: Whose they are.
            param: The request's field that asks for so many.

        Raises:
            InvalidRequestError: If that many could never be admitted together.
            OverloadedError: If not enough are free now.
        """
        if count > self.capacity:
            raise InvalidRequestError(
                f"{param}: {count} sequences are more than the {self.capacity} that this server takes at once",
                param=param,
            )
        if self.num_in_use + count > self.capacity:
            raise OverloadedError(
                f"the server is full: {self.num_in_use} of {self.capacity} places are taken and {count} asked for"
            )
        self.num_in_use += count
        permits = Permits(self, count, tenant)
        try:
            yield permits
        finally:
            permits.release_all()
