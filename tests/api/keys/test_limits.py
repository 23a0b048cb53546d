"""Limits of keys: the token buckets, and the headers and errors that clients get."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from server.api.keys.key_file import read_keys
from server.api.keys.keys import ApiKeys
from server.api.keys.limits import KeyLimiter, Limits, TokenBucket, duration
from server.errors import ConfigurationError, RateLimitError
from tests.support.fake_engine import FakeEngine
from tests.support.keyed import bearer, key_entry
from tests.support.presence import present
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("still_clock")]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(
    st.tuples(
        st.floats(0, 90),
        st.one_of(
            st.tuples(st.just("take"), st.integers(0, 150)),
            st.tuples(st.just("end"), st.floats(0, 1)),
        ),
    ),
    max_size=40,
)


@given(limit=st.integers(1, 100), steps=STEPS)
def test_no_window_exceeds_the_limit_plus_its_burst(limit: int, steps: list[tuple[float, tuple[str, int]]]) -> None:
    """Tokens are taken at random times and partly refunded; the net amount is limited in every window."""
    clock = Clock()
    bucket = TokenBucket(limit, clock)
    events: list[tuple[float, float]] = []
    open_takes: list[int] = []
    for pause, (kind, amount) in steps:
        clock.now += pause
        if kind == "take":
            if bucket.seconds_until(amount) == 0:
                bucket.take(amount)
                open_takes.append(amount)
                events.append((clock.now, float(amount)))
            else:
                with pytest.raises(RuntimeError):
                    bucket.take(amount)
        elif open_takes:
            unused = int(open_takes.pop() * amount)
            bucket.give_back(unused)
            events.append((clock.now, -float(unused)))
        assert 0 <= bucket.level <= limit
    for start in range(len(events)):
        for end in range(start, len(events)):
            seconds = events[end][0] - events[start][0]
            net = sum(amount for _, amount in events[start : end + 1])
            assert net <= limit * (1 + seconds / 60) + 1e-6


@given(limit=st.integers(1, 10_000), taken=st.integers(0, 10_000), wanted=st.integers(0, 10_000))
def test_the_reported_wait_is_enough_and_minimal(limit: int, taken: int, wanted: int) -> None:
    clock = Clock()
    bucket = TokenBucket(limit, clock)
    bucket.take(min(taken, limit))
    wanted = min(wanted, limit)
    seconds = bucket.seconds_until(wanted)
    clock.now += seconds + 1e-6
    assert bucket.seconds_until(wanted) == pytest.approx(0, abs=1e-6)
    assert bucket.level == pytest.approx(max(wanted, limit - min(taken, limit)), abs=1e-2)


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 100), st.floats(0, 30), st.booleans()), max_size=30
    )
)
def test_a_limiter_refunds_exactly_the_unused_tokens(requests: list[tuple[int, int, float, bool]]) -> None:
    clock = Clock()
    limiter = KeyLimiter(Limits(5, 50, 1), clock)
    for tokens, used, pause, fails in requests:
        clock.now += pause
        before = limiter.headers
        left = int(before["x-ratelimit-remaining-tokens"])
        is_refused = tokens > left or before["x-ratelimit-remaining-requests"] == "0"
        if is_refused:
            with pytest.raises(RateLimitError) as refusal, limiter.admitted() as allowance:
                try:
                    allowance.reserve(tokens)
                finally:
                    allowance.forget_request()
            assert present(refusal.value.retry_after) > 0
            assert refusal.value.is_hopeless == (
                tokens > 50 and left > 0 and before["x-ratelimit-remaining-requests"] != "0"
            )
            assert limiter.headers == before
            continue
        with suppress(ZeroDivisionError), limiter.admitted(takes_tokens=False) as allowance:
            assert limiter.num_running == 1
            with pytest.raises(RateLimitError, match="1 requests at once"), limiter.admitted():
                pass
            allowance.reserve(tokens)
            allowance.used = min(used, tokens)
            if fails:
                raise ZeroDivisionError
        assert abs(left - int(limiter.headers["x-ratelimit-remaining-tokens"]) - min(used, tokens)) <= 1
        assert limiter.num_running == 0


@given(steps=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 200), st.floats(0, 60)), max_size=20))
def test_a_refused_request_is_charged_for_completed_work(steps: list[tuple[int, int, float]]) -> None:
    """A refused request pays for its tokenised text, and no key owes more than one minute's tokens."""
    clock = Clock()
    limiter = KeyLimiter(Limits(tokens_per_minute=50), clock)
    level = 50.0
    for tokens, done, pause in steps:
        clock.now += pause
        level = min(50.0, level + pause * 50 / 60)
        refusal = None
        try:
            with limiter.admitted() as allowance:
                allowance.reserve(tokens, done=done)
                allowance.settle(done)
                allowance.settle(done)  # settling is idempotent
        except RateLimitError as error:
            refusal = error
        if level < 1 - 1e-6:
            assert refusal is not None
            assert "none now" in refusal.message
            continue
        if refusal is not None and not refusal.is_hopeless:
            left = max(-50.0, level - done) + present(refusal.retry_after) * 50 / 60
            assert left >= min(tokens, 50) - 1e-6
        level = max(-50.0, level - done)
        assert isinstance(limiter._tokens, TokenBucket)
        assert limiter._tokens.level == pytest.approx(level, abs=1e-6)
        assert int(limiter.headers["x-ratelimit-remaining-tokens"]) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.02, "20ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (63.5, "1m3.5s")],
)
def test_durations_are_formatted_like_openais(seconds: float, text: str) -> None:
    assert duration(seconds) == text


KEYS = "".join(
    [
        key_entry("few", tenant="", scopes=["generate", "prompts:read"], requests_per_minute=2),
        key_entry("short", tenant="", scopes=["generate"], tokens_per_minute=20),
        key_entry("alone", tenant="", scopes=["generate"], max_concurrency=1),
        key_entry("free", tenant="", scopes=["generate"]),
    ]
)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/v1/classify", {"input": "x", "labels": ["a", "b"]}),
    ],
)
async def test_requests_per_minute_are_limited(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    for left in ("1", "0"):
        response = await client.post(path, json=body, headers=bearer("few"))
        assert response.status_code == 200, response.text
        assert response.headers["x-ratelimit-limit-requests"] == "2"
        assert response.headers["x-ratelimit-remaining-requests"] == left
        assert "x-ratelimit-limit-tokens" not in response.headers
    refused = await client.post(path, json=body, headers=bearer("few"))
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert 25_000 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert 25 < int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert (await client.get("/v1/models", headers=bearer("few"))).status_code == 200
    free = await client.post(path, json=body, headers=bearer("free"))
    assert free.status_code == 200
    assert not any(name.startswith("x-ratelimit") for name in free.headers)


async def test_tokens_are_reserved_and_refunded(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reply = "hi"
    body = {"prompt": [1, 2, 3], "max_tokens": 10}
    response = await client.post("/v1/completions", json=body, headers=bearer("short"))
    used = response.json()["usage"]["total_tokens"]
    assert used == 6  # the end-of-sequence token counts
    assert response.headers["x-ratelimit-remaining-tokens"] == str(20 - used)
    assert response.headers["x-ratelimit-limit-tokens"] == "20"
    refused = await client.post("/v1/completions", json=body | {"max_tokens": 17}, headers=bearer("short"))
    assert refused.status_code == 429
    assert "x-should-retry" not in refused.headers
    never = await client.post("/v1/completions", json=body | {"n": 2}, headers=bearer("short"))
    assert never.status_code == 429
    assert never.headers["x-should-retry"] == "false"
    assert "23 tokens" in never.json()["error"]["message"]
    assert never.headers["x-ratelimit-remaining-tokens"] == str(20 - used)


async def test_a_refusal_for_another_reason_costs_no_tokens(app: FastAPI, client: httpx.AsyncClient) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 10}
    with app.state.services.admission.permits(app.state.services.admission.capacity):
        response = await client.post("/v1/completions", json=body, headers=bearer("short"))
    assert response.json()["error"]["code"] == "overloaded"
    assert response.headers["x-ratelimit-remaining-tokens"] == "20"


async def test_concurrent_requests_are_limited(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.step_seconds = 0.05
    first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}, headers=bearer("alone")))
    await until(lambda: engine.requests)
    second = await client.post("/v1/completions", json={"prompt": "x"}, headers=bearer("alone"))
    assert second.status_code == 429
    assert second.headers["retry-after"] == "1"
    assert (await first).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "x"}, headers=bearer("alone"))).status_code == 200


def test_usage_survives_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    keys = ApiKeys(read_keys(path))
    with keys.check("Bearer few").limiter.admitted() as allowance:
        allowance.reserve(1)
    keys.replace(read_keys(path))
    assert keys.check("Bearer few").limiter.headers["x-ratelimit-remaining-requests"] == "1"
    path.write_text(KEYS.replace("requests_per_minute = 2", "requests_per_minute = 3"))
    keys.replace(read_keys(path))
    assert keys.check("Bearer few").limiter.headers["x-ratelimit-remaining-requests"] == "3"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", '"9"', "10000000000000"])
def test_bad_limits_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nkey = "k"\nscopes = ["generate"]\ntokens_per_minute = {value}\n')
    with pytest.raises(ConfigurationError, match=r"keys\[0\]\.tokens_per_minute"):
        read_keys(path)
