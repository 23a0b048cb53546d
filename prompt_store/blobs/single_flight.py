"""Work that several threads want at once, done once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """The first caller of a key does the work; those who come while it lasts wait, and have its result or its error.

    Nothing is kept once the work is done: the next caller does it afresh.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[K, Future[V]] = {}

    def do(self, key: K, work: Callable[[], V]) -> V:
        """The result of ``work``, or of the work that another thread is doing for this key.

        Raises:
            BaseException: What the work raised, in every thread that waited for it.
        """
        with self._lock:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not leads:
            return flight.result()
        try:
            result = work()
        except BaseException as error:
            self._land(key)
            flight.set_exception(error)
            raise
        self._land(key)
        flight.set_result(result)
        return result

    def _land(self, key: K) -> None:
        # Before the result is given out, so that whoever comes after it was seen does not meet the old one.
        with self._lock:
            del self._flights[key]
