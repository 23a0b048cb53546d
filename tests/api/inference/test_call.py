"""A request that is cancelled at any await releases everything once and has one outcome."""

from __future__ import annotations

import asyncio
import itertools
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.inference.call import Call
from server.api.inference.entry import allowance_of
from server.api.inference.request_record import RequestRecord
from server.api.inference.responses import Usage
from server.api.keys.callers import ANYBODY
from server.api.keys.limits import Allowance, KeyLimiter, Limits
from server.metrics.metrics import Metrics
from tests.support.api_fixtures import CountingStore
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "a"}]}
BODIES: dict[str, tuple[str, dict[str, object]]] = {
    "text": ("/v1/completions", {"prompt": "a", "model": "a"}),
    "texts": ("/v1/completions", {"prompt": ["a", "b"], "model": "a", "n": 2}),
    "stream": ("/v1/completions", {"prompt": ["a", "b"], "model": "a", "stream": True}),
    "chat": ("/v1/chat/completions", {**CHAT, "prompt_id": "a", "stream": True}),
    "vote": ("/v1/completions", {"prompt": ["a", "b"], "model": ["a", "b"]}),
    "mean": ("/v1/completions", {"prompt": ["a", "b"], "model": ["a", "b"], "ensemble": "mean"}),
    "labels": ("/v1/classify", {"input": ["a", "b"], "model": "a", "labels": ["x", "y"]}),
}
MEMBERS = {"vote": 2, "mean": 2}


@types.coroutine
def cancelled_at(coroutine: Coroutine[Any, Any, Any], step: int | None) -> Generator[Any, Any, int]:
    """Await a coroutine and cancel its task at the ``step``-th suspension.

    Returns:
        How often it suspended.
    """
    task = asyncio.current_task()
    assert task is not None
    error: BaseException | None = None
    for count in itertools.count():
        try:
            awaited = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration:
            break
        if count == step:
            task.cancel()
        try:
            yield awaited
        except BaseException as thrown:
            error = thrown
        else:
            error = None
    return count


async def cancelled(coroutine: Coroutine[Any, Any, Any], step: int) -> None:
    await cancelled_at(coroutine, step)


MINUTE_TOKENS = 1000


class Outcomes:
    """What one request recorded, and what it took from a key whose limits never refill."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_admitted = 0
        self.allowance: Allowance | None = None
        self.limiter = self._new_limiter()
        self.ended: list[str] = []
        self.counted: list[tuple[str | None, str]] = []
        admit, end, count = Call.admit, RequestRecord.end, Metrics.count_request

        def admit_and_note(call: Call, *args: Any, **kwargs: Any) -> None:
            self.allowance = allowance_of(call.request)
            admit(call, *args, **kwargs)
            self.num_admitted += 1

        def end_and_note(record: RequestRecord, outcome: str, usage: Usage) -> None:
            self.ended.append(outcome)
            end(record, outcome, usage)

        def count_and_note(metrics: Metrics, name: str | None, outcome: str, **measured: Any) -> None:
            self.counted.append((name, outcome))
            count(metrics, name, outcome, **measured)

        monkeypatch.setattr(Call, "admit", admit_and_note)
        monkeypatch.setattr(RequestRecord, "end", end_and_note)
        monkeypatch.setattr(Metrics, "count_request", count_and_note)
        monkeypatch.setattr("server.api.inference.entry.caller_of", lambda _: replace(ANYBODY, limiter=self.limiter))

    @property
    def num_tokens_taken(self) -> int:
        return MINUTE_TOKENS - int(self.limiter.headers["x-ratelimit-remaining-tokens"])

    def reset(self) -> None:
        self.num_admitted = 0
        self.allowance = None
        self.limiter = self._new_limiter()
        self.ended.clear()
        self.counted.clear()

    @staticmethod
    def _new_limiter() -> KeyLimiter:
        return KeyLimiter(Limits(tokens_per_minute=MINUTE_TOKENS), clock=lambda: 0.0)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Outcomes:
    return Outcomes(monkeypatch)


@pytest.fixture
async def check(
    app: FastAPI,
    client: httpx.AsyncClient,
    engine: FakeEngine,
    store: CountingStore,
    outcomes: Outcomes,
    upload_parts: Callable[..., dict[str, Any]],
    eventually: Callable[..., float],
) -> Callable[[int, set[str]], None]:
    """Check that a request released everything, and that an admitted one has one outcome per member."""
    for seed, name in enumerate(("a", "b")):
        (await client.post("/v1/prompts", **upload_parts(name, seed=seed))).raise_for_status()
    engine.reply = "hi"
    outcomes.reset()

    def check_all(num_members: int, allowed: set[str]) -> None:
        assert app.state.services.admission.num_in_use == 0
        assert app.state.services.admission.expected_wait("") == 0
        assert engine.in_flight == 0
        assert outcomes.limiter.num_running == 0
        if outcomes.allowance is not None:
            assert outcomes.num_tokens_taken == outcomes.allowance.used > 0
        eventually(lambda: len(store.released) >= len(store.leased))
        assert sorted(map(id, store.released)) == sorted(map(id, store.leased))
        assert outcomes.num_admitted <= 1
        assert len(outcomes.ended) == outcomes.num_admitted
        assert set(outcomes.ended) <= allowed
        expected = [(name, outcome) for outcome in outcomes.ended for name in "ab"[:num_members]]
        assert outcomes.counted == expected

    return check_all


@pytest.mark.parametrize("kind", BODIES)
async def test_a_request_cancelled_at_any_await_releases_everything(
    client: httpx.AsyncClient, check: Callable[[int, set[str]], None], outcomes: Outcomes, kind: str
) -> None:
    path, body = BODIES[kind]
    num_members = MEMBERS.get(kind, 1)
    num_suspensions = await cancelled_at(client.post(path, json=body), None)
    check(num_members, {"stop"})
    assert outcomes.ended == ["stop"]
    found: set[str] = set()
    for step in range(num_suspensions):
        outcomes.reset()
        task = asyncio.create_task(cancelled(client.post(path, json=body), step))
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        check(num_members, {"stop", "abort"})
        found.update(outcomes.ended)
    assert "abort" in found


@pytest.mark.parametrize("fail_after", [0, 1])
@pytest.mark.parametrize("kind", BODIES)
async def test_a_failure_has_one_outcome(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    check: Callable[[int, set[str]], None],
    outcomes: Outcomes,
    kind: str,
    fail_after: int,
) -> None:
    path, body = BODIES[kind]
    engine.failure, engine.fail_after = ZeroDivisionError("a bug"), fail_after
    response = await client.post(path, json=body)
    has_begun = "stream" in body and fail_after > 0
    assert response.status_code == (200 if has_begun else 500)
    check(MEMBERS.get(kind, 1), {"error"})
    assert outcomes.ended == ["error"]


@pytest.mark.parametrize("kind", BODIES)
async def test_a_request_is_measured_once(
    client: httpx.AsyncClient, check: Callable[[int, set[str]], None], kind: str
) -> None:
    path, body = BODIES[kind]
    before = (await client.get("/metrics")).text
    assert "prelude_e2e_request_latency_seconds_count 0.0" in before
    (await client.post(path, json=body)).raise_for_status()
    check(MEMBERS.get(kind, 1), {"stop"})
    after = (await client.get("/metrics")).text
    assert "prelude_e2e_request_latency_seconds_count 1.0" in after
    num_first_tokens = 0.0 if kind == "labels" else 1.0
    assert f"prelude_time_to_first_token_seconds_count {num_first_tokens}" in after
