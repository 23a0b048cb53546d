"""Jobs beside the step loop: order, turns, cancelling, closing, and jobs that raise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.background_jobs import BackgroundJobs
from tests.support.waiting import wait_until

Jobs = BackgroundJobs[Any, Any]


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    jobs = Jobs("jobs", on_ended=lambda: None)
    yield jobs
    jobs.close()


def collect(jobs: Jobs, count: int) -> list[tuple[Any, Any]]:
    ended: list[tuple[Any, Any]] = []
    wait_until(lambda: ended.extend(jobs.take_ended()) or len(ended) >= count, 10)
    return ended


def hold(jobs: Jobs) -> Callable[[], None]:
    """Keep the thread busy until the returned function is called."""
    started, go = threading.Event(), threading.Event()

    def wait(_: threading.Event) -> None:
        started.set()
        go.wait()

    jobs.submit("held", wait, tenant="holder")
    started.wait()
    return go.set


def test_tenants_take_turns_and_the_jobs_of_each_run_in_order(jobs: Jobs) -> None:
    release = hold(jobs)
    for key in ("a1", "a2", "a3", "b1", "b2"):
        jobs.submit(key, lambda _, key=key: key.upper(), tenant=key[0])
    jobs.submit("b1", lambda _: "second", tenant="a")  # it waits already: it keeps its place
    assert (jobs.num_waiting("a"), jobs.num_waiting("b"), jobs.num_waiting("c")) == (3, 2, 0)
    release()
    ended = collect(jobs, 6)
    assert ended == [("held", None)] + [(key, key.upper()) for key in ("a1", "b1", "a2", "b2", "a3")]


def test_a_job_that_raises_ends_with_its_error_and_the_next_runs(jobs: Jobs) -> None:
    class Panic(BaseException):
        pass

    errors = [ValueError("wrong"), Panic("not an Exception")]

    def fail(_: threading.Event) -> None:
        raise errors[len(seen)]

    seen: list[tuple[Any, Any]] = []
    for key in "ab":
        jobs.submit(key, fail)
        seen += collect(jobs, 1)
    jobs.submit("c", lambda _: 1)
    assert [*seen, *collect(jobs, 1)] == [("a", errors[0]), ("b", errors[1]), ("c", 1)]


def test_the_step_loop_is_woken_after_each_job() -> None:
    woken = threading.Semaphore(0)
    jobs = Jobs("jobs", on_ended=woken.release)
    for key in range(3):
        jobs.submit(key, lambda _: None)
        assert woken.acquire(timeout=10)
        assert jobs.take_ended() == [(key, None)]
    jobs.close()
    assert not woken.acquire(blocking=False)


def test_cancelling_a_running_job_sets_its_event_alone(jobs: Jobs) -> None:
    started = threading.Event()

    def wait(cancelled: threading.Event) -> bool:
        started.set()
        return cancelled.wait(10)

    jobs.submit("running", wait)
    jobs.submit("next", lambda cancelled: cancelled.is_set())
    started.wait()
    jobs.cancel("running")
    jobs.submit("running", lambda cancelled: cancelled.is_set())  # a new job with the same key is not cancelled
    jobs.cancel("unknown")
    assert collect(jobs, 3) == [("running", True), ("next", False), ("running", False)]


def test_closing_drops_what_waits_and_cancels_what_runs() -> None:
    jobs = Jobs("jobs", on_ended=lambda: None)
    started = threading.Event()

    def wait(cancelled: threading.Event) -> bool:
        started.set()
        return cancelled.wait(10)

    jobs.submit("running", wait)
    jobs.submit("waiting", wait)
    started.wait()
    jobs.close()
    assert jobs.take_ended() == [("running", True)]
    jobs.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        jobs.submit("late", wait)
    assert jobs.num_waiting("") == 0


def test_only_this_thread_gets_the_stack_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = threading.stack_size
    monkeypatch.setattr(threading, "stack_size", lambda size: sizes.append(size) or own(size))
    jobs = Jobs("deep", on_ended=lambda: None, stack_bytes=64 << 20)
    jobs.submit("name", lambda _: (threading.current_thread().name, list(sizes)))
    ((_, (name, sizes_before)),) = collect(jobs, 1)
    assert name.startswith("deep")
    assert sizes_before[0] == 64 << 20
    assert sizes == [64 << 20, own()]
    jobs.close()


class JobsMachine(RuleBasedStateMachine):
    """Jobs of three tenants, each of which runs when the machine says so, against a model of turns."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs = Jobs("machine", on_ended=lambda: None)
        self.go = threading.Semaphore(0)
        self.started: list[int] = []
        self.waiting: dict[str, list[int]] = {}
        """By tenant, the next first."""
        self.running: int | None = None
        self.cancelled = False

    def run(self, key: int, cancelled: threading.Event) -> bool:
        self.started.append(key)
        self.go.acquire()
        return cancelled.is_set()

    def start_next(self) -> None:
        """The thread takes the first job of the tenant whose turn it is."""
        self.running, self.cancelled = None, False
        if self.waiting:
            tenant, keys = next(iter(self.waiting.items()))
            del self.waiting[tenant]
            self.running = keys.pop(0)
            if keys:
                self.waiting[tenant] = keys
            wait_until(lambda: self.started == [self.running], 10)
        self.started.clear()

    @rule(key=st.integers(0, 5), tenant=st.sampled_from("xyz"))
    def submit(self, key: int, tenant: str) -> None:
        self.jobs.submit(key, lambda cancelled: self.run(key, cancelled), tenant=tenant)
        if not any(key in keys for keys in self.waiting.values()):
            self.waiting.setdefault(tenant, []).append(key)
        if self.running is None:
            self.start_next()

    @rule(key=st.integers(0, 5))
    def cancel(self, key: int) -> None:
        self.jobs.cancel(key)
        self.cancelled |= key == self.running
        for tenant, keys in list(self.waiting.items()):
            if key in keys:
                keys.remove(key)
            if not keys:
                del self.waiting[tenant]

    @precondition(lambda self: self.running is not None)
    @rule()
    def end(self) -> None:
        expected = [(self.running, self.cancelled)]
        self.go.release()
        assert collect(self.jobs, 1) == expected
        self.start_next()

    @invariant()
    def waiting_jobs_are_counted(self) -> None:
        assert {name: self.jobs.num_waiting(name) for name in "xyz"} == {
            name: len(self.waiting.get(name, ())) for name in "xyz"
        }

    def teardown(self) -> None:
        expected = [] if self.running is None else [(self.running, True)]
        self.jobs.stop()
        self.go.release()
        self.jobs.close()
        assert self.jobs.take_ended() == expected
        assert self.started == []


TestJobsMachine = JobsMachine.TestCase
TestJobsMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
