"""Sessions of the console: how long they last, and what ends them."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from server.api.keys.key_file import parse_plain
from server.api.keys.keys import ApiKeys
from server.api.keys.sessions import (
    IDLE_SECONDS,
    MAX_AGE_SECONDS,
    MAX_SESSIONS,
    MemorySessions,
    Sessions,
    SignedSessions,
    open_sessions,
)
from server.errors import AuthenticationError, ConfigurationError
from tests.support.presence import present

SECRET = bytes(range(32))


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def keys_of(*texts: str) -> ApiKeys:
    return ApiKeys(parse_plain((text, text) for text in texts))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "signed"])
def sessions(request: pytest.FixtureRequest, clock: Clock) -> Sessions:
    keys = keys_of("one", "two")
    return MemorySessions(keys, clock) if request.param == "memory" else SignedSessions(keys, SECRET, clock)


def test_a_session_stands_for_its_key(sessions: Sessions) -> None:
    tokens = {key: sessions.begin(key) for key in ("one", "two")}
    assert len(set(tokens.values())) == 2
    for key, token in tokens.items():
        assert present(sessions.find(token)).caller == sessions.keys.find(key).caller
    sessions.end(tokens["one"])
    assert sessions.find(tokens["one"]) is None
    assert sessions.find(tokens["two"]) is not None
    sessions.end(tokens["one"])


def test_a_session_needs_a_valid_key(sessions: Sessions) -> None:
    for key in ("three", "", "\ud800"):
        with pytest.raises(AuthenticationError, match="not valid"):
            sessions.begin(key)


@pytest.mark.parametrize("token", ["", "x", "\xe4", "\ud800", "A" * 43, "=" * 8, "A" * 4096])
def test_unknown_tokens_are_no_sessions(sessions: Sessions, token: str) -> None:
    sessions.begin("one")
    assert sessions.find(token) is None
    sessions.end(token)


def test_a_session_ends_when_it_is_idle(sessions: Sessions, clock: Clock) -> None:
    token = sessions.begin("one")
    clock.now += IDLE_SECONDS - 1
    assert sessions.find(token, is_use=False) is not None
    clock.now += 1
    assert sessions.find(token) is None


def test_a_used_session_lasts_a_week(sessions: Sessions, clock: Clock) -> None:
    token, began = sessions.begin("one"), clock.now
    while clock.now - began < MAX_AGE_SECONDS - IDLE_SECONDS / 2:
        clock.now += IDLE_SECONDS / 2
        session = present(sessions.find(token))
        assert session.expires_at <= began + MAX_AGE_SECONDS
        token = sessions.renewed(token) or token
    clock.now = began + MAX_AGE_SECONDS - 1
    assert sessions.find(token) is not None
    clock.now += 1
    assert sessions.find(token) is None
    assert sessions.renewed(token) is None


def test_a_removed_key_ends_its_sessions(sessions: Sessions) -> None:
    tokens = {key: sessions.begin(key) for key in ("one", "two")}
    sessions.keys.replace(parse_plain([("here", "two")]))
    assert sessions.find(tokens["one"]) is None
    assert sessions.find(tokens["two"]) is not None


def test_memory_holds_a_bounded_number_of_sessions(clock: Clock) -> None:
    sessions = MemorySessions(keys_of("one", "two"), clock)
    kept = sessions.begin("two")
    first, *others = [sessions.begin("one") for _ in range(MAX_SESSIONS - 1)]
    assert sessions.find(first) is not None, "its use makes it the most recent one"
    latest = sessions.begin("one")
    assert len(sessions) == MAX_SESSIONS
    assert sessions.find(others[0]) is None, "the key with the most sessions loses its least recently used one"
    assert all(sessions.find(token) is not None for token in (kept, first, others[1], latest))
    clock.now += IDLE_SECONDS
    sessions.begin("two")
    assert len(sessions) == 1


def test_memory_holds_no_token(clock: Clock) -> None:
    sessions = MemorySessions(keys_of("one"), clock)
    token = sessions.begin("one")
    assert len(base64.urlsafe_b64decode(token + "=")) == 32
    assert token not in str(vars(sessions))


def test_signed_tokens_are_valid_on_every_server_with_the_secret(clock: Clock) -> None:
    one, other = (SignedSessions(keys_of("one"), SECRET, clock) for _ in range(2))
    token = one.begin("one")
    assert present(other.find(token)).caller.name == present(one.find(token)).caller.name
    assert SignedSessions(keys_of("one"), SECRET[::-1], clock).find(token) is None
    assert SignedSessions(keys_of("two"), SECRET, clock).find(token) is None


def test_a_changed_token_is_no_session(clock: Clock) -> None:
    sessions = SignedSessions(keys_of("one"), SECRET, clock)
    token = sessions.begin("one")
    signed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    for position in range(len(signed)):
        changed = bytearray(signed)
        changed[position] ^= 1
        assert sessions.find(base64.urlsafe_b64encode(changed).decode().rstrip("=")) is None
    assert sessions.find(token) is not None


def test_the_secret_comes_from_a_file(tmp_path: Path) -> None:
    path, keys = tmp_path / "secret", keys_of("one")
    path.write_bytes(SECRET.hex().encode() + b"\n")
    token = present(open_sessions(keys, path)).begin("one")
    assert present(open_sessions(keys, path)).find(token) is not None
    assert isinstance(open_sessions(keys, None), MemorySessions)
    assert open_sessions(None, path) is None
    path.write_bytes(b"short\n")
    for wrong, message in ((path, "at least 32"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ConfigurationError, match=message):
            open_sessions(keys, wrong)
