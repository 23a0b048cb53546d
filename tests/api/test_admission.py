"""Permits, and the estimate of how long the next one would wait."""

from __future__ import annotations

import pytest

from server.api.admission import Admission
from server.errors import OverloadedError, WaitTimeoutError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def queue_of(admission: Admission, clock: Clock, stack, tenant: str, count: int, *, begun: int, every: float):
    """One request of ``count`` sequences, of which ``begun`` have begun, one ``every`` so many seconds."""
    permits = stack.enter_context(admission.permits(count, tenant=tenant))
    for _ in range(begun):
        clock.now += every
        permits.begin_one()
    return permits


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(1000, clock=clock)


def test_a_queue_is_as_long_as_it_moves(admission, clock) -> None:
    with admission.permits(60, tenant="a") as permits:
        for _ in range(20):
            clock.now += 0.1
            permits.begin_one()
        assert admission.expected_wait("a") == pytest.approx(40 * 0.1, rel=0.1)
        assert admission.expected_wait("b") == 0
        admission.check("a", None)
        admission.check("a", 5.0)
        with pytest.raises(WaitTimeoutError, match=r"about \d.\d seconds for its turn, and 2 are allowed"):
            admission.check("a", 2.0)
        admission.check("b", 2.0)  # its turn is the next but one
        clock.now += 20  # nothing has begun for so long
        assert admission.expected_wait("a") > 40
    assert admission.expected_wait("a") == 0
    assert admission.num_in_use == 0


def test_tenants_share_the_rate(admission, clock) -> None:
    with admission.permits(40, tenant="a") as a, admission.permits(10, tenant="b") as b:
        for _ in range(10):
            clock.now += 0.1
            a.begin_one()
        for _ in range(5):
            clock.now += 0.1
            b.begin_one()
        assert admission.expected_wait("a") == pytest.approx(30 * 2 * 0.1, rel=0.1)
        assert admission.expected_wait("b") == pytest.approx(5 * 2 * 0.1, rel=0.1)


def test_an_idle_time_is_no_slow_queue(admission, clock) -> None:
    with admission.permits(20, tenant="a") as permits:
        for _ in range(20):
            clock.now += 0.01
            permits.begin_one()
    clock.now += 1000
    with admission.permits(50, tenant="a"):
        assert admission.expected_wait("a") == 0
        admission.check("a", 0.1)


def test_what_ends_before_it_began_waits_no_more(admission, clock) -> None:
    with admission.permits(12, tenant="a") as permits:
        for _ in range(9):
            clock.now += 1
            permits.begin_one()
        before = admission.expected_wait("a")
        for _ in range(10):
            permits.release_one()
        assert 0 < admission.expected_wait("a") < before
        permits.begin_one()
        permits.begin_one()
        assert admission.expected_wait("a") == 0


def test_a_full_server_is_told_before_any_work(admission) -> None:
    with admission.permits(1000, tenant="a"), pytest.raises(OverloadedError, match="all of its 1000 places"):
        admission.check("b", None)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/classify", {"input": "a", "labels": ["x", "y"]}),
    ],
)
async def test_who_would_wait_too_long_is_refused_at_once(app, client, engine, path, body) -> None:
    admission = app.state.services.admission
    with admission.permits(4, tenant=""):
        admission._begun.extend([0.0] * 8)
        refused = await client.post(path, json=body | {"timeout": 3})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded_waiting")
        assert int(refused.headers["retry-after"]) > 0
        assert engine.requests == []
        assert (await client.post(path, json=body | {"timeout": 3, "priority": -1})).status_code == 200
        assert (await client.post(path, json=body)).status_code == 200
