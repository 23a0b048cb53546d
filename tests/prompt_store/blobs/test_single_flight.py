"""Concurrent requests for the same work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prompt_store.blobs.single_flight import SingleFlight

THREADS = 8


def run_together(flight: SingleFlight[str, object], error: Exception | None = None) -> tuple[list[object], int]:
    """The result of each thread, and the number of runs; the work lasts until all other threads wait for it."""
    arrived = threading.Semaphore(0)
    calls = []

    def work() -> object:
        calls.append(1)
        for _ in range(THREADS - 1):
            arrived.acquire()
        if error is not None:
            raise error
        return object()

    started = threading.Event()

    def lead() -> object:
        def first() -> object:
            started.set()
            return work()

        return flight.do("key", first)

    def follow() -> object:
        started.wait()
        arrived.release()
        return flight.do("key", lambda: "done again")

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(lead), *(pool.submit(follow) for _ in range(THREADS - 1))]
        results = [future.exception() or future.result() for future in futures]
    return results, len(calls)


def test_all_waiting_threads_get_the_first_result() -> None:
    flight: SingleFlight[str, object] = SingleFlight()
    results, calls = run_together(flight)
    assert calls == 1
    # The last thread may arrive just after the end, and does the work again.
    assert results.count(results[0]) >= 1
    assert all(result is results[0] or result == "done again" for result in results)


def test_all_waiting_threads_get_the_error_and_the_next_call_works_again() -> None:
    flight: SingleFlight[str, object] = SingleFlight()
    error = OSError("no way")
    results, calls = run_together(flight, error)
    assert calls == 1
    assert results[0] is error
    assert all(result is error or result == "done again" for result in results)
    assert flight.do("key", lambda: 7) == 7


def test_threads_wait_for_slow_work() -> None:
    flight: SingleFlight[str, int] = SingleFlight()
    release, started = threading.Event(), threading.Event()

    def slow() -> int:
        started.set()
        release.wait()
        return 1

    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(flight.do, "a", slow)
        started.wait()
        follower = pool.submit(flight.do, "a", lambda: 2)
        assert flight.do("b", lambda: 3) == 3  # another key does not wait
        with pytest.raises(TimeoutError):
            follower.result(timeout=0.05)
        release.set()
        assert (leader.result(), follower.result()) == (1, 1)
