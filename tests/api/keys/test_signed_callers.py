"""What an ingress signs, and what a replica refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.keys.signed_callers import (
    INGRESS_HEADER,
    LIFETIME_SECONDS,
    LOAD_HEADER,
    CallerKind,
    CallerSigner,
    target_of,
)
from server.config import Settings
from server.errors import ConfigurationError, NotFromIngressError
from tests.support.api_fixtures import MakeApp
from tests.support.in_process import started
from tests.support.keyed import key_entry

SECRET = b"s" * 32
REQUEST: dict[str, Any] = {"method": "GET", "target": b"/v1/me?x=1", "request_id": "r1"}


def signer(secret: bytes = SECRET, now: float = 1000.0) -> CallerSigner:
    return CallerSigner(secret, lambda: now)


def test_a_signature_is_for_one_request_and_one_secret() -> None:
    value = signer().sign(CallerKind.KEY, "key-1", **REQUEST)
    found = signer().check(value, **REQUEST)
    assert (found.kind, found.key) == (CallerKind.KEY, "key-1")
    others: list[dict[str, Any]] = [
        {"method": "POST"},
        {"target": b"/v1/me?x=2"},
        {"request_id": "r2"},
        {"request_id": "r1/v1"},
    ]
    for other in others:
        with pytest.raises(NotFromIngressError):
            signer().check(value, **(REQUEST | other))
    for wrong in (signer(b"t" * 32), signer(now=1000.0 + LIFETIME_SECONDS)):
        with pytest.raises(NotFromIngressError):
            wrong.check(value, **REQUEST)


@pytest.mark.parametrize("value", [None, "", "x", "\u20ac", "A" * 64, "A" * 5000])
def test_anything_else_is_refused(value: str | None) -> None:
    with pytest.raises(NotFromIngressError):
        signer().check(value, **REQUEST)


@pytest.fixture
def replica(make_app: MakeApp, settings: Settings, tmp_path: Path) -> FastAPI:
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "keys.toml").write_text(key_entry("k1", scopes=("generate",)) + key_entry("k2", scopes=("admin",)))
    http = replace(settings.http, ingress_secret_file=tmp_path / "secret", api_key_file=tmp_path / "keys.toml")
    return make_app(replace(settings, http=http, replica_name="demo-0"))


async def ask(client: httpx.AsyncClient, kind: CallerKind, key: str = "", path: str = "/v1/me") -> httpx.Response:
    target = target_of(path.encode(), b"")
    value = CallerSigner(SECRET).sign(kind, key, method="GET", target=target, request_id="r")
    return await client.get(path, headers={INGRESS_HEADER: value, "x-request-id": "r"})


def name_of(app: FastAPI, index: int) -> str:
    key, _ = app.state.services.api_keys.described()[index]
    name: str = key.caller.name
    return name


async def check_replica(replica: FastAPI) -> None:
    async with started(replica) as client:
        for path in ("/live", "/v1/me"):
            reply = await client.get(path, headers={"authorization": "Bearer k1"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "not_from_ingress")
        reply = await ask(client, CallerKind.KEY, name_of(replica, 0))
        assert (reply.status_code, reply.json()["tenant"], reply.json()["scopes"]) == (200, "k1", ["generate"])
        assert reply.headers[LOAD_HEADER] == "0"
        assert (await ask(client, CallerKind.KEY, "key-unknown")).status_code == 401
        assert (await ask(client, CallerKind.UNKNOWN)).status_code == 401
        assert (await ask(client, CallerKind.UNKNOWN, path="/live")).status_code == 200
        while (await ask(client, CallerKind.UNKNOWN, path="/ready")).status_code != 200:
            pass
        assert (await ask(client, CallerKind.KEY, name_of(replica, 0), "/v1/replica")).status_code == 403
        report = (await ask(client, CallerKind.CLUSTER, path="/v1/replica")).json()
        assert (report["object"], report["name"], report["load"], report["capacity"]) == ("replica", "demo-0", 0, 8)


def test_a_replica_answers_the_ingress_only(replica: FastAPI) -> None:
    import asyncio

    asyncio.run(check_replica(replica))


def test_a_short_secret_is_refused(make_app: MakeApp, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("short")
    with pytest.raises(ConfigurationError, match="ingress secret file"):
        make_app(replace(settings, http=replace(settings.http, ingress_secret_file=tmp_path / "secret")))
