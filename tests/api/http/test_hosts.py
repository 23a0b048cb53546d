"""The host names that a server accepts, as protection from DNS rebinding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.http.hosts import Hosts
from server.config import Settings
from server.errors import ConfigurationError
from tests.support.keyed import locked

LOOPBACK: tuple[str, ...] = (
    "localhost",
    "LocalHost:8000",
    "localhost.",
    "localhost.:1",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.8.9.10:1",
)
LOOPBACK += ("[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]")
FOREIGN: tuple[str, ...] = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "",
    ":8000",
)
FOREIGN += ("128.0.0.1", "10.0.0.1", "[::2]", "0.0.0.0", "127.1", "2130706433", "localhos", "a.localhost")  # noqa: S104
FOREIGN += ("[::ffff:127.0.0.1]:1", "[::1", "localhost..", "l\xf6calhost")


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_names_are_always_accepted(host: str) -> None:
    for names in ((), ("prelude.example",)):
        hosts = Hosts.parse(names, is_guarded=True)
        assert hosts is not None
        assert host in hosts


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused(host: str) -> None:
    hosts = Hosts.parse((), is_guarded=True)
    assert hosts is not None
    assert host not in hosts


@pytest.mark.parametrize(
    ("added", "host"),
    [
        ("prelude.example", "Prelude.Example:9000"),
        ("Prelude.Example.", "prelude.example."),
        ("192.168.1.5", "192.168.1.5:8000"),
        ("[fd00:0::5]", "[fd00::5]:8000"),
        ("fd00::5", "[FD00::5]"),
        ("my_box", "my_box"),
    ],
)
def test_configured_names_are_accepted(added: str, host: str) -> None:
    for is_guarded in (False, True):
        hosts = Hosts.parse([added], is_guarded=is_guarded)
        assert hosts is not None
        assert host in hosts
        assert "evil.example" not in hosts
        assert f"{host.partition(':')[0]}.evil.example" not in hosts


def test_names_are_not_checked_when_unguarded_or_with_a_star() -> None:
    assert Hosts.parse((), is_guarded=False) is None
    assert Hosts.parse(("*",), is_guarded=True) is None
    assert Hosts.parse(("a.example", " * "), is_guarded=True) is None


@pytest.mark.parametrize(
    "name", ["", " ", "http://a.example", "a.example:80", "*.a.example", "a/b", "a b", "[::1]:80"]
)
def test_bad_names_are_refused_in_the_settings(
    make_app: Callable[[Settings], FastAPI], settings: Settings, name: str
) -> None:
    with pytest.raises(ConfigurationError, match="--allowed-host"):
        make_app(replace(settings, http=replace(settings.http, allowed_host=(name,))))


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
async def test_a_foreign_host_is_421_on_every_path(client: httpx.AsyncClient, method: str) -> None:
    for path in (
        "/live",
        "/ready",
        "/health",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v1/models",
        "/v1/prompts",
        "/no",
    ):
        response = await client.request(method, path, headers={"host": "evil.example:8000"})
        assert response.status_code == 421
        assert response.headers["x-request-id"]
        if method != "HEAD":
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("misdirected_request", None)
            assert "--allowed-host evil.example" in error["message"]
    assert 'prelude_request_errors_total{code="misdirected_request"} 9.0' in (await client.get("/metrics")).text


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["", "a' or <b>", "x" * 300 + "$"])
async def test_unusual_names_are_not_repeated(client: httpx.AsyncClient, host: str) -> None:
    response = await client.get("/live", headers={"host": host})
    assert response.status_code == 421
    message = response.json()["error"]["message"]
    assert "--allowed-host" not in message
    assert not host or host not in message


def _served(make_app: Callable[[Settings], FastAPI], settings: Settings, **http: Any) -> httpx.AsyncClient:
    app = make_app(replace(settings, http=replace(settings.http, **http)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pod.example:8000")


@pytest.mark.anyio
async def test_only_guarded_servers_check_host_names(
    make_app: Callable[[Settings], FastAPI], settings: Settings, tmp_path: Path
) -> None:
    async def status(**http: Any) -> int:
        async with _served(make_app, settings, **http) as client:
            return (await client.get("/live")).status_code

    everywhere = {"host": "0.0.0.0", "allow_open": True}  # noqa: S104
    assert await status() == 421
    assert await status(host="::1") == 421
    assert await status(allow_open=True) == 421
    assert await status(allowed_host=("pod.example",)) == 200
    assert await status(allowed_host=("*",)) == 200
    assert await status(**everywhere) == 200
    assert await status(**everywhere, allowed_host=("a.example",)) == 421
    assert await status(api_keys=("k" * 40,)) == 200
    assert await status(api_keys=("k" * 40,), allowed_host=("a.example",)) == 421
    app = locked(make_app, settings, tmp_path / "keys", "secret\n")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://10.1.2.3:8000") as probe:
        assert (await probe.get("/live")).status_code == 200
