"""Buckets that several servers share: the accounting, without a database."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.keys.limits import KeyLimiter, Limits, TokenBucket
from tests.support.presence import present

PERIOD = 1.0
"""Longest time from one exchange of a server to the end of its next one."""


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Row:
    """The bucket in the catalog, which ``SharedLimits`` keeps in the same way."""

    limit: int
    clock: Clock
    full_at: float = 0.0

    def add(self, amount: float) -> float:
        if amount:
            self.full_at = max(self.full_at, self.clock.now) + amount * 60 / self.limit
        return max(0.0, self.full_at - self.clock.now)


@dataclass
class Server:
    """One server; ``at`` is the time of the exchange whose result it has."""

    bucket: TokenBucket
    row: Row
    at: float
    answer: tuple[float, float] | None = None
    open_takes: list[int] = field(default_factory=list)

    def ask(self) -> None:
        """The exchange in the database."""
        common = present(self.bucket.common)
        self.answer = (self.row.clock.now, self.row.add(common.send()))

    def learn(self) -> None:
        """Its end on the server, possibly later."""
        asked_at, seconds = present(self.answer)
        present(self.bucket.common).learn(seconds)
        self.at, self.answer = asked_at, None


def shared(limit: int, clock: Clock) -> TokenBucket:
    bucket = TokenBucket(limit, clock)
    bucket.share()
    return bucket


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.9, 5.0]) | st.floats(0, 20),
        st.integers(0, 3),
        st.tuples(st.just("take"), st.integers(1, 8))
        | st.tuples(st.just("end"), st.floats(0, 1))
        | st.tuples(st.sampled_from(["ask", "learn"]), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(limit=st.integers(1, 10), number=st.integers(1, 4), steps=STEPS)
def test_servers_accept_the_limit_and_what_the_others_took_since_two_exchanges(
    limit: int, number: int, steps: list[tuple[float, int, tuple[str, float]]]
) -> None:
    """In every window: ``limit * (1 + (T + period) / 60)``, and what other servers took in two periods."""
    clock = Clock()
    row = Row(limit, clock)
    servers = [Server(shared(limit, clock), row, clock.now) for _ in range(number)]
    for server in servers:
        server.ask()
        server.learn()
    events: list[tuple[float, int, float]] = []

    def pass_time(until: float) -> None:
        """Let time pass with the exchanges that are due then: each within the period."""
        while True:
            due = min(servers, key=lambda one: one.at)
            if due.at + PERIOD > until:
                break
            clock.now = max(clock.now, due.at + PERIOD)
            if due.answer is None:
                due.ask()
            due.learn()
        clock.now = until

    for pause, index, (kind, amount) in steps:
        pass_time(clock.now + pause)
        who = index % number
        server = servers[who]
        if kind == "take":
            if server.bucket.seconds_until(amount) == 0:
                server.bucket.take(int(amount))
                server.open_takes.append(int(amount))
                events.append((clock.now, who, float(amount)))
        elif kind == "end":
            if server.open_takes:
                unused = int(server.open_takes.pop() * amount)
                server.bucket.give_back(unused)
                events.append((clock.now, who, -float(unused)))
        elif kind == "ask":
            if server.answer is None:
                server.ask()
        elif server.answer is not None:
            server.learn()
    unseen = max(
        (
            sum(other for when, by, other in events if other > 0 and by != who and at - 2 * PERIOD <= when <= at)
            for at, who, amount in events
            if amount > 0
        ),
        default=0.0,
    )
    for start in range(len(events)):
        for end in range(start, len(events)):
            seconds = events[end][0] - events[start][0]
            net = sum(amount for _, _, amount in events[start : end + 1])
            assert net <= limit * (1 + (seconds + PERIOD) / 60) + unseen + 1e-6


@given(
    limit=st.integers(1, 100),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 120), st.integers(0, 120), st.booleans()), max_size=30),
)
def test_one_server_alone_is_as_without_a_catalog(limit: int, steps: list[tuple[float, int, int, bool]]) -> None:
    """With an exchange after each request the common bucket equals its own, so nothing changes for one server."""
    clock = Clock()
    plain, bucket, row = TokenBucket(limit, clock), shared(limit, clock), Row(limit, clock)
    common = present(bucket.common)
    for pause, amount, done, is_known in steps:
        clock.now += pause
        if is_known:
            common.learn(row.add(common.send()))
        assert bucket.level == pytest.approx(plain.level, abs=1e-6)
        if plain.level >= amount + 1e-6:
            for one in (plain, bucket):
                one.take(amount)
                one.give_back(min(amount, done))
        else:
            for one in (plain, bucket):
                one.overdraw(done)
        common.learn(row.add(common.send()))
        assert bucket.level == pytest.approx(plain.level, abs=1e-6)
        assert -limit - 1e-6 <= bucket.level <= limit + 1e-6


def test_a_server_that_loses_the_catalog_counts_alone() -> None:
    clock = Clock()
    bucket = shared(60, clock)
    common = present(bucket.common)
    assert common.level is None  # before the first exchange
    bucket.take(10)
    common.learn(45)
    assert bucket.level == pytest.approx(60 - 45 - 10)  # what it took since then counts as well
    common.forget()
    assert bucket.level == pytest.approx(50)
    assert common.send() == 0  # it may have arrived
    bucket.take(5)
    common.learn(0)
    assert bucket.level == pytest.approx(45)
    assert common.send() == 5


def test_a_bucket_that_owes_is_refilled_first() -> None:
    clock = Clock()
    bucket = shared(60, clock)
    common = present(bucket.common)
    common.learn(150)  # three servers took 150 of 60
    assert bucket.level == pytest.approx(-90)
    assert bucket.seconds_until(1) == pytest.approx(91)
    bucket.overdraw(20)  # it owes more than a minute already
    assert bucket.level == pytest.approx(-90)
    assert common.send() == 0
    clock.now += 91
    assert bucket.seconds_until(1) == pytest.approx(0)


def test_the_requests_of_other_servers_take_places_and_show_in_the_headers() -> None:
    clock = Clock()
    limiter = KeyLimiter(Limits(60, 600, 2), clock)
    assert (limiter.common, limiter.places_left) == ({}, 2)
    limiter.share()
    limiter.share()
    limiter.common["requests"].learn(20)
    limiter.common["tokens"].learn(30)
    limiter.num_elsewhere = 1
    assert limiter.places_left == 1
    with limiter.admitted() as allowance:
        allowance.reserve(100)
        assert limiter.places_left == 0
        assert limiter.headers["x-ratelimit-remaining-requests"] == "39"
        assert limiter.headers["x-ratelimit-remaining-tokens"] == "200"
        assert limiter.headers["x-ratelimit-reset-tokens"] == "40s"
        allowance.used = 40
    assert limiter.headers["x-ratelimit-remaining-tokens"] == "260"
    assert {what: common.send() for what, common in limiter.common.items()} == {"requests": 1, "tokens": 40}
    assert KeyLimiter(Limits(), clock).places_left is None
