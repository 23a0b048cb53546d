"""Admission permits: overload is refused at the door, not queued without end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import InvalidRequestError, OverloadedError


class Permits:
    """The permits of one request; each sequence gives its own back when it ends."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count

    def release_one(self) -> None:
        """Give back the permit of a sequence that has ended."""
        if self._count == 0:
            raise RuntimeError("more permits were given back than taken")
        self._count -= 1
        self._admission.num_in_use -= 1

    def release_all(self) -> None:
        """Give back what is left."""
        while self._count:
            self.release_one()


class Admission:
    """Counts the sequences in the server. Used on the event loop only, so it needs no lock.

    Attributes:
        capacity: Sequences that may be in the server at once, running and waiting.
        num_in_use: Sequences that are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_in_use = 0

    @contextmanager
    def permits(self, count: int, *, param: str = "prompt") -> Iterator[Permits]:
        """Take a permit for each of a request's sequences, all or none, until the block ends.

        Args:
            count: How many.
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
        permits = Permits(self, count)
        try:
            yield permits
        finally:
            permits.release_all()
