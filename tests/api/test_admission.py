"""Permits, and the estimated wait for the next one."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.admission import LATEST_SECONDS, SOONEST_SECONDS, Admission, Permits
from server.api.early_refusal import AdmissionMiddleware
from server.api.inference.request_record import MAX_MODEL_CHARS, RequestRecord
from server.api.middleware import RequestIdMiddleware
from server.config import Settings
from server.errors import OverloadedError, WaitTimeoutError
from tests.support.api_fixtures import MakeApp
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.fake_engine import FakeEngine
from tests.support.in_process import ready
from tests.support.operations import OPERATIONS
from tests.support.presence import present


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def queue_of(
    admission: Admission, clock: Clock, stack: ExitStack, tenant: str, count: int, *, begun: int, every: float
) -> Permits:
    """One request of ``count`` sequences, of which ``begun`` have begun, one each ``every`` seconds."""
    permits = stack.enter_context(admission.permits(count, tenant=tenant))
    for _ in range(begun):
        clock.now += every
        permits.begin()
    return permits


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(1000, clock=clock)


def test_the_expected_wait_follows_the_queues_rate(admission: Admission, clock: Clock) -> None:
    with admission.permits(60, tenant="a") as permits:
        for _ in range(20):
            clock.now += 0.1
            permits.begin()
        assert admission.expected_wait("a") == pytest.approx(40 * 0.1, rel=0.1)
        assert admission.expected_wait("b") == 0
        admission.check("a", None)
        admission.check("a", 5.0)
        with pytest.raises(
            WaitTimeoutError, match=r"about \d.\d seconds in the queue, longer than its timeout of 2 seconds"
        ):
            admission.check("a", 2.0)
        admission.check("b", 2.0)  # its turn is second
        clock.now += 20  # no sequence has begun for this long
        assert admission.expected_wait("a") > 40
    assert admission.expected_wait("a") == 0
    assert admission.num_in_use == 0


def test_tenants_share_the_rate(admission: Admission, clock: Clock) -> None:
    with admission.permits(40, tenant="a") as a, admission.permits(10, tenant="b") as b:
        for _ in range(10):
            clock.now += 0.1
            a.begin()
        for _ in range(5):
            clock.now += 0.1
            b.begin()
        assert admission.expected_wait("a") == pytest.approx(30 * 2 * 0.1, rel=0.1)
        assert admission.expected_wait("b") == pytest.approx(5 * 2 * 0.1, rel=0.1)


def test_idle_time_does_not_count_as_a_slow_queue(admission: Admission, clock: Clock) -> None:
    with admission.permits(20, tenant="a") as permits:
        for _ in range(20):
            clock.now += 0.01
            permits.begin()
    clock.now += 1000
    with admission.permits(50, tenant="a"):
        assert admission.expected_wait("a") == 0
        admission.check("a", 0.1)


def test_a_sequence_that_ends_before_it_begins_leaves_the_queue(admission: Admission, clock: Clock) -> None:
    with admission.permits(12, tenant="a") as permits:
        for _ in range(9):
            clock.now += 1
            permits.begin()
        before = admission.expected_wait("a")
        permits.release(has_begun=False)
        assert 0 < admission.expected_wait("a") < before
        for _ in range(9):
            permits.release(has_begun=True)
        assert admission.expected_wait("a") > 0
        permits.begin()
        permits.begin()
        assert admission.expected_wait("a") == 0
        with pytest.raises(RuntimeError, match="more sequences began"):
            permits.begin()
        permits.release_all()
        with pytest.raises(RuntimeError, match="more permits"):
            permits.release(has_begun=True)
    assert admission.num_in_use == 0


def test_permits_outside_the_queue_do_not_affect_the_estimate(admission: Admission, clock: Clock) -> None:
    with admission.permits(1, tenant="a", waits=False), admission.permits(20, tenant="a") as permits:
        for _ in range(20):
            clock.now += 1
            permits.begin()
        assert admission.num_in_use == 21
        clock.now += 100
        admission.check("a", 0.1)


def retry_after_of(error: pytest.ExceptionInfo[OverloadedError | WaitTimeoutError]) -> float:
    assert error.value.retry_after is not None
    return error.value.retry_after


def test_each_refused_request_gets_a_separate_turn(admission: Admission, clock: Clock) -> None:
    with admission.permits(60, tenant="a") as permits:
        for _ in range(20):
            clock.now += 0.1
            permits.begin()
        pace = 1.9 / 20  # 20 beginnings are 19 intervals
        found = []
        for _ in range(10):
            with pytest.raises(WaitTimeoutError) as error:
                admission.check("a", 2.0)
            found.append(retry_after_of(error))
        assert found[0] == pytest.approx(40 * pace)
        steps = [then - now for now, then in itertools.pairwise(found)]
        assert steps == pytest.approx([pace] * 9)
        clock.now += 0.3
        with pytest.raises(WaitTimeoutError) as error:
            admission.check("a", 2.0)
        assert found[-1] - 0.3 < retry_after_of(error) < found[-1]  # one turn later, minus the elapsed time
        admission.check("b", 2.0)


def test_the_retry_time_has_a_minimum(admission: Admission, clock: Clock) -> None:
    with admission.permits(40, tenant="a") as permits:
        for _ in range(30):
            clock.now += 0.01
            permits.begin()
        assert admission.expected_wait("a") < 0.2
        first, second = (present(admission.retry_after("a")) for _ in range(2))
        assert first == SOONEST_SECONDS
        assert first < second < first + 0.02


def test_distant_turns_get_a_random_retry_time_below_the_maximum(clock: Clock) -> None:
    drawn: list[tuple[float, float]] = []

    def between(low: float, high: float) -> float:
        drawn.append((low, high))
        return 42.0

    admission = Admission(1000, clock=clock, between=between)
    with admission.permits(60, tenant="a") as permits:
        for _ in range(20):
            clock.now += 1
            permits.begin()
        found = [present(admission.retry_after("a")) for _ in range(40)]
        assert found == sorted(found[:24]) + [42.0] * 16
        assert all(seconds <= LATEST_SECONDS for seconds in found)
        assert drawn == [(LATEST_SECONDS / 2, LATEST_SECONDS)] * 16
        clock.now += 10
        assert admission.retry_after("a") != 42.0  # turns have passed, so some are free again


def test_turns_are_separate_per_tenant_and_end_with_its_queue(admission: Admission, clock: Clock) -> None:
    with admission.permits(20, tenant="b") as b:
        with admission.permits(30, tenant="a") as a:
            for _ in range(10):
                clock.now += 0.5
                a.begin()
            first = present(admission.retry_after("b"))
            for _ in range(20):
                admission.retry_after("a")
            assert admission.retry_after("b") == pytest.approx(first + 0.9)
        assert admission._turns.keys() == {"b"}
        assert admission.retry_after("a") is None
        assert b.retry_after == b.retry_after  # one turn per request
    assert admission._turns == {}


def test_there_is_no_retry_time_without_a_queue_rate(admission: Admission) -> None:
    assert admission.retry_after("a") is None
    with admission.permits(1000, tenant="a"):
        with pytest.raises(OverloadedError) as error:
            admission.check("a", None)
        assert error.value.retry_after is None


def test_a_full_server_returns_the_retry_time(admission: Admission, clock: Clock) -> None:
    with admission.permits(1000, tenant="a") as permits:
        for _ in range(10):
            clock.now += 0.01
            permits.begin()
        with pytest.raises(OverloadedError) as error:
            admission.check("a", None)
        assert retry_after_of(error) == pytest.approx(990 * 0.009)
        with pytest.raises(OverloadedError) as error, admission.permits(1, tenant="a"):
            pass
        assert retry_after_of(error) == pytest.approx(991 * 0.009)


def test_a_full_server_refuses_before_any_work(admission: Admission) -> None:
    with admission.permits(1000, tenant="a"), pytest.raises(OverloadedError, match="all 1000 places"):
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
async def test_a_request_that_would_wait_too_long_is_refused_at_once(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    admission = app.state.services.admission
    with admission.permits(4, tenant=""):
        admission._begun.extend([0.0] * 8)
        refused = await client.post(path, json=body | {"timeout": 3})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded_waiting")
        assert int(refused.headers["retry-after"]) > 0
        assert engine.requests == []
        assert (await client.post(path, json=body | {"timeout": 3, "priority": -1})).status_code == 200
        assert (await client.post(path, json=body)).status_code == 200


LIMITED = [
    ("/v1/completions", {"prompt": "a"}, "text_completion"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "chat"),
    ("/v1/classify", {"input": "a", "labels": ["x", "y"]}, "classify"),
]


@pytest.fixture
def long_queue(make_app: MakeApp, settings: Settings) -> Iterator[FastAPI]:
    """A server whose queue for requests without a key takes longer than the maximum wait."""
    app = make_app(replace(settings, http=replace(settings.http, max_wait_seconds=3.0)))
    admission = app.state.services.admission
    with admission.permits(4):
        admission._begun.extend([0.0] * 8)
        yield app


@pytest.fixture
def records(long_queue: FastAPI, monkeypatch: pytest.MonkeyPatch) -> list[RequestRecord]:
    found: list[RequestRecord] = []
    own: Any = RequestIdMiddleware
    (middleware,) = [item for item in long_queue.user_middleware if item.cls == own]
    monkeypatch.setitem(middleware.kwargs, "observers", [found.append])
    return found


@pytest.fixture
async def queued(long_queue: FastAPI, records: list[RequestRecord]) -> AsyncIterator[httpx.AsyncClient]:
    async with ready(long_queue) as client:
        yield client


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body", "operation"), LIMITED)
async def test_a_request_that_would_wait_too_long_is_not_validated(
    queued: httpx.AsyncClient,
    long_queue: FastAPI,
    records: list[RequestRecord],
    engine: FakeEngine,
    tokenizer: ByteTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    operation: str,
) -> None:
    async def encode(*_: object, **__: object) -> list[list[int]]:
        raise AssertionError("a refused request was tokenised")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", encode)
        # With validation, the wrong field would be a 400.
        refused = await queued.post(path, json=body | {"model": "tiny", "temperature": -1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded_waiting")
    milliseconds = int(refused.headers["retry-after-ms"])
    assert (
        1000 * LATEST_SECONDS / 2 <= milliseconds <= 1000 * LATEST_SECONDS
    )  # no sequence has begun for a very long time
    assert int(refused.headers["retry-after"]) == math.ceil(milliseconds / 1000)
    record = records[-1]
    assert refused.headers["x-request-id"] == record.request_id
    assert (record.status, record.error, record.operation) == (503, "overloaded_waiting", operation)
    assert record.model == "tiny"
    assert b'request_errors_total{code="overloaded_waiting"} 1.0' in (await queued.get("/metrics")).content
    assert engine.requests == []
    urgent = await queued.post(path, json=body | {"priority": -1})
    assert urgent.status_code == 200, urgent.text
    assert long_queue.state.services.admission.num_in_use == 4


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "priority": "soon"}',
        b'{"prompt": "a", "model": 5}',
        b'{"prompt": "a", "priority": -1.5}',
        b"[]",
        b"{",
        b"",
        b"[" * 30_000,
        b'{"x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    ],
)
async def test_an_invalid_body_gets_its_validation_error(queued: httpx.AsyncClient, body: bytes) -> None:
    answer = await queued.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.anyio
async def test_a_long_model_name_is_truncated_in_records(
    queued: httpx.AsyncClient, records: list[RequestRecord]
) -> None:
    refused = await queued.post("/v1/completions", json={"model": "m" * 50_000, "prompt": "a"})
    assert refused.status_code == 503
    assert records[-1].model == "m" * MAX_MODEL_CHARS


@pytest.mark.anyio
async def test_only_refused_requests_take_a_turn(
    queued: httpx.AsyncClient, long_queue: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(long_queue.state.services.admission, "retry_after", asked.append)
    for body in ({"prompt": "a", "priority": -1}, {"prompt": "a", "priority": "soon"}):
        assert (await queued.post("/v1/completions", json=body)).status_code in {200, 400}
    assert asked == []
    assert (await queued.post("/v1/completions", json={"prompt": "a"})).status_code == 503
    assert asked == [""]


@pytest.mark.anyio
async def test_a_long_queue_does_not_affect_other_paths_and_methods(queued: httpx.AsyncClient) -> None:
    assert (await queued.post("/tokenize", json={"prompt": "a"})).status_code == 200
    assert (await queued.get("/v1/models")).status_code == 200
    assert (await queued.get("/v1/completions")).status_code == 405


@pytest.mark.anyio
async def test_a_body_over_the_limit_is_413_even_in_a_long_queue(queued: httpx.AsyncClient) -> None:
    answer = await queued.post("/v1/completions", json={"prompt": "a" * 70_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


@pytest.mark.anyio
async def test_an_urgent_body_in_pieces_reaches_its_route_whole(queued: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"prior', b'ity": -1, "prompt"', b': "abc", "max_tokens": 20}'):
            yield piece

    answer = await queued.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["text"] == "hello world"


@pytest.mark.anyio
async def test_a_disconnect_during_the_body_gets_no_answer(long_queue: FastAPI) -> None:
    sent = []

    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    matched = OPERATIONS.match("POST", "/v1/completions")
    scope = {"type": "http", "method": "POST", "headers": [], "state": {"matched": matched}}
    reached = []

    async def app(scope: object, receive: Callable[..., Awaitable[object]], send: object) -> None:
        reached.append(await receive())

    await AdmissionMiddleware(app, services=long_queue.state.services)(scope, receive, send)
    assert (reached, sent) == ([{"type": "http.disconnect"}], [])
