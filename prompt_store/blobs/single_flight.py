"""Concurrent requests for the same work, done once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """The first caller of a key does the work; callers during the work wait for its result or error.

    Results are not cached: the next caller does the work again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[K, Future[V]] = {}

    def do(self, key: K, work: Callable[[], V]) -> V:
        """The result of ``work``, or of the work that another thread does for this key now.

        Raises:
            BaseException: The error of the work, in every thread that waited for it.
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
            self._end_flight(key)
            flight.set_exception(error)
            raise
        self._end_flight(key)
        flight.set_result(result)
        return result

    def _end_flight(self, key: K) -> None:
        # Before the result is set: a caller that has seen it must not join the old flight.
        with self._lock:
            del self._flights[key]
