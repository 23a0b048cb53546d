"""Logging in to the console, and what the cookie of a session is good for."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from server.config import Settings
from server.console.routes import TRIES_PER_MINUTE, Tries
from server.errors import RateLimitError
from tests.support.api_fixtures import MakeApp
from tests.support.in_process import ready
from tests.support.keyed import bearer, key_entry
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

KEYS = key_entry("reader", tenant="acme", scopes=["prompts:read"]) + key_entry("writer", tenant="acme")
OWN = {"sec-fetch-site": "same-origin"}
CONSOLE = {"x-prelude-console": "1"}


async def log_in(client: httpx.AsyncClient, key: str = "reader", **headers: str) -> httpx.Response:
    return await client.post("/console/session", json={"key": key}, headers=headers)


async def test_a_login_gives_a_cookie_in_place_of_the_key(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/prompts")).status_code == 401
    response = await log_in(client)
    assert (response.status_code, response.content) == (204, b"")
    name, *attributes = response.headers["set-cookie"].split("; ")
    assert name.startswith("prelude_session=")
    assert len(name.partition("=")[2]) == 43
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=strict"]
    assert (await client.get("/v1/prompts")).status_code == 200
    me = (await client.get("/v1/me")).json()
    assert (me["tenant"], me["scopes"]) == ("acme", ["prompts:read"])
    session = (await client.get("/console/session")).json()
    assert (session["has_keys"], session["tenant"], session["key"]) == (True, "acme", me["key"])
    assert session["expires_at"] > time.time()


async def test_https_makes_the_cookie_secure(client: httpx.AsyncClient) -> None:
    response = await log_in(client, origin="https://localhost")
    cookie = response.headers["set-cookie"]
    assert cookie.startswith("__Host-prelude_session=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=strict"} == set(cookie.split("; ")[1:])
    token = cookie.partition("=")[2].partition(";")[0]
    client.cookies.clear()
    for name, status in (("__Host-prelude_session", 200), ("prelude_session", 401)):
        headers = {"cookie": f"{name}={token}", "origin": "https://localhost"}
        assert (await client.get("/v1/prompts", headers=headers)).status_code == status


@pytest.mark.parametrize("key", ["wrong", " ", "\ud800"])
async def test_a_wrong_key_gets_no_cookie(client: httpx.AsyncClient, key: str) -> None:
    response = await client.post(
        "/console/session", content='{"key": "' + key.replace("\ud800", "\\ud800") + '"}', headers=JSON
    )
    assert response.status_code == (400 if key == "\ud800" else 401)
    assert "set-cookie" not in response.headers


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ('{"key": "reader"}', {"content-type": "text/plain"}, 415),
        ("key=reader", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("{}", JSON, 400),
        ('{"key": ""}', JSON, 400),
        ('{"key": 1}', JSON, 400),
        ('{"key": "' + "x" * 5000 + '"}', JSON, 400),
        ('{"key": "reader"}', JSON | {"sec-fetch-site": "cross-site"}, 403),
        ('{"key": "reader"}', JSON | {"origin": "https://evil.example"}, 403),
    ],
)
async def test_a_malformed_or_foreign_login_is_refused(
    client: httpx.AsyncClient, body: str, headers: dict[str, str], status: int
) -> None:
    response = await client.post("/console/session", content=body, headers=headers)
    assert response.status_code == status
    assert "set-cookie" not in response.headers


async def test_other_methods_than_get_need_the_header(client: httpx.AsyncClient) -> None:
    await log_in(client, "writer")
    body = {"prompt": "x", "max_tokens": 1}
    refused = await client.post("/v1/completions", json=body, headers=OWN)
    assert refused.status_code == 401
    assert "X-Prelude-Console" in refused.json()["error"]["message"]
    assert (await client.head("/metrics")).status_code == 401
    assert (await client.post("/v1/completions", json=body, headers=OWN | CONSOLE)).status_code == 200
    assert (await client.post("/v1/completions", json=body, headers=CONSOLE | {"x-prelude-console": "0"})).is_error


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
    ],
)
async def test_a_cookie_does_not_count_from_another_origin(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    await log_in(client)
    for path in ("/v1/prompts", "/console/session"):
        assert (await client.get(path, headers=OWN)).status_code == 200
        assert (await client.get(path, headers=headers | CONSOLE)).status_code == 401


async def test_a_cookie_does_not_count_from_an_allowed_origin(
    make_app: MakeApp, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "keys.toml").write_text(KEYS)
    http = replace(settings.http, api_key_file=tmp_path / "keys.toml", allow_origin=("https://page.example",))
    async with ready(make_app(replace(settings, http=http))) as client:
        await log_in(client, "writer")
        headers = {"origin": "https://page.example", "sec-fetch-site": "cross-site"} | CONSOLE
        assert (await client.get("/v1/prompts", headers=headers)).status_code == 401
        assert (await client.get("/v1/prompts", headers=headers | bearer("writer"))).status_code == 200


async def test_authorization_wins_over_the_cookie(client: httpx.AsyncClient) -> None:
    await log_in(client)
    me = await client.get("/v1/me", headers=bearer("writer"))
    assert me.json()["scopes"] == ["generate", "prompts:read", "prompts:write"]
    assert (await client.get("/v1/me", headers=bearer("wrong"))).status_code == 401
    assert (await client.get("/v1/me", headers={"authorization": ""})).status_code == 401


async def test_a_scope_that_the_key_lacks_is_named(client: httpx.AsyncClient) -> None:
    await log_in(client)
    response = await client.delete("/v1/prompts/x", headers=CONSOLE)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_scope")


async def test_a_logout_ends_the_session_on_the_server(client: httpx.AsyncClient) -> None:
    await log_in(client)
    token = client.cookies["prelude_session"]
    assert (await client.delete("/console/session", headers=OWN)).status_code == 401
    assert (await client.get("/v1/me")).status_code == 200
    response = await client.delete("/console/session", headers=CONSOLE)
    assert response.status_code == 204
    assert client.cookies.get("prelude_session") is None
    stolen = {"cookie": f"prelude_session={token}"}
    assert (await client.get("/v1/me", headers=stolen)).status_code == 401
    assert (await client.get("/console/session", headers=stolen)).status_code == 401
    assert (await client.delete("/console/session", headers=CONSOLE)).status_code == 204


async def test_a_key_that_leaves_the_file_ends_its_session(client: httpx.AsyncClient, tmp_path: Path) -> None:
    await log_in(client)
    (tmp_path / "keys.toml").write_text(key_entry("writer"))

    async def has_ended() -> bool:
        return (await client.get("/v1/me")).status_code == 401

    await until(has_ended)
    assert "session has ended" in (await client.get("/v1/me")).json()["error"]["message"]


async def test_an_address_has_ten_tries_a_minute(client: httpx.AsyncClient) -> None:
    answers = [await log_in(client, "wrong") for _ in range(TRIES_PER_MINUTE + 1)]
    assert [answer.status_code for answer in answers] == [401] * TRIES_PER_MINUTE + [429]
    assert int(answers[-1].headers["retry-after"]) > 0
    assert (await log_in(client)).status_code == 429, "a right key has no other budget"


def test_tries_are_counted_by_network_and_refilled() -> None:
    now = 0.0
    tries = Tries(lambda: now)
    same = ("2001:db8::1", "2001:db8:0:0:1::2", "2001:db8::3")
    for number in range(TRIES_PER_MINUTE):
        tries.take(same[number % 3])
        tries.take(("10.0.0.1", "::ffff:10.0.0.1")[number % 2])
    for spent in (*same, "10.0.0.1"):
        with pytest.raises(RateLimitError):
            tries.take(spent)
    for other in ("2001:db8:0:1::1", "10.0.0.2", "", "unix"):
        tries.take(other)
    now = 6.0
    tries.take("10.0.0.1")
    for number in range(5000):
        tries.take(f"10.1.{number // 256}.{number % 256}")
    tries.take(same[0])


async def test_a_server_without_keys_has_no_login(make_app: MakeApp, settings: Settings) -> None:
    async with ready(make_app(settings)) as client:
        session = (await client.get("/console/session")).json()
        assert (session["has_keys"], session["key"], session["expires_at"]) == (False, None, None)
        assert session["scopes"] == ["admin", "generate", "prompts:read", "prompts:write"]
        assert (await log_in(client)).status_code == 404
        assert (await client.delete("/console/session")).status_code == 204
        assert (await client.get("/console/session", headers={"host": "evil.example"})).status_code == 421
