"""Key files, environment keys, reloading, and the scopes that paths need."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.api.keys import keys as auth
from server.api.keys.callers import ALL_SCOPES, Scope
from server.api.keys.key_file import new_key, read_keys
from server.api.keys.keys import ApiKeys, collect_keys
from server.app import ROUTERS
from server.cli import app as cli
from server.config import HttpSettings, Settings
from server.errors import AuthenticationError, ConfigurationError
from tests.support.api_fixtures import MakeApp
from tests.support.keyed import bearer, locked
from tests.support.operations import operations_of
from tests.support.presence import present
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HASH = "sha256:" + sha256(b"key-b").hexdigest()

ENTRIES = f"""
[[keys]]
key = "key-a"
tenant = "acme"
scopes = ["generate", "prompts:read"]

[[keys]]
key = "{HASH}"
tenant = "acme"
scopes = ["prompts:write"]

[[keys]]
key = "key-c"
scopes = ["admin"]
"""


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(ENTRIES)
    return path


@pytest.fixture
def app(make_app: MakeApp, settings: Settings, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(auth, "POLL_SECONDS", 0.01)
    return locked(make_app, settings, key_file, ENTRIES)


def test_key_file_entries_are_parsed(key_file: Path, tmp_path: Path) -> None:
    as_json = tmp_path / "keys.json"
    as_json.write_text(json.dumps(tomllib.loads(ENTRIES)))
    for path in (key_file, as_json):
        keys = ApiKeys(read_keys(path))
        first, second, third = (keys.check(f"bearer {key}") for key in ("key-a", "key-b", "key-c"))
        assert (first.tenant, first.scopes) == ("acme", frozenset({Scope.GENERATE, Scope.PROMPTS_READ}))
        assert (second.tenant, second.scopes) == ("acme", frozenset({Scope.PROMPTS_WRITE}))
        assert third.tenant == third.name == f"key-{sha256(b'key-c').hexdigest()[:12]}"
        with pytest.raises(AuthenticationError):
            keys.check(f"Bearer {HASH}")  # a hash from the file is not a key


def test_plain_lines_may_be_hashed_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"\ufeffkey-a\n{HASH}\n", encoding="utf-8")
    keys = ApiKeys(read_keys(path))
    callers = [keys.check(f"Bearer {key}") for key in ("key-a", "key-b")]
    assert all(caller.scopes == ALL_SCOPES for caller in callers)
    assert callers[0].tenant != callers[1].tenant


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("k", "a\n\n# c\na\n", "line 4: the same key appears at line 1"),
        ("k", "a\nsha256:12\n", "line 2: after sha256:"),
        ("k", "a\x7fb\n", "line 1: a key must not be empty"),
        ("k.toml", "keys = 3", r"\$\.keys"),
        ("k.toml", "[[keys]\n", "line 1"),
        ("k.toml", "", "missing required field `keys`"),
        ("k.toml", "keys = []", "contains no key"),
        ("k.json", "{", "truncated"),
        ("k.json", "[" * 100_000, "k.json"),
        ("k.json", '{"keys": [{"key": "a", "scopes": ["generate"]}, {"key": "a"}]}', r"keys\[1\]"),
        ("k.json", '{"keys": [{"key": "a", "scopes": ["all"]}]}', r"keys\[0\].scopes\[0\]"),
        ("k.json", '{"keys": [{"key": "a", "scopes": []}]}', r"keys\[0\].scopes: must contain some"),
        ("k.json", '{"keys": [{"key": " a", "scopes": ["admin"]}]}', r"keys\[0\].key: a key"),
        ("k.json", '{"keys": [{"key": "", "scopes": ["admin"]}]}', r"keys\[0\].key: a key"),
        ("k.json", '{"keys": [{"key": "a", "scopes": ["admin"], "tenant": "A B"}]}', r"keys\[0\].tenant"),
        ("k.json", '{"keys": [{"key": "a", "scopes": ["admin"], "tenants": "a"}]}', "tenants"),
    ],
)
def test_the_error_names_the_fault(tmp_path: Path, name: str, text: str, reason: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=reason):
        read_keys(path)


@given(text=st.text(max_size=60), name=st.sampled_from(["k", "k.toml", "k.json"]))
def test_any_file_is_parsed_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        keys = read_keys(path)
    except ConfigurationError:
        return
    assert all(len(key.digest) == 32 and key.caller.tenant for key in keys)


def test_an_error_does_not_contain_the_key(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    path.write_text('{"keys": [{"key": "very secret ", "scopes": ["admin"]}]}')
    with pytest.raises(ConfigurationError) as error:
        read_keys(path)
    assert "secret" not in str(error.value)


def test_keys_are_read_from_the_environment(key_file: Path) -> None:
    http = HttpSettings(api_key_file=key_file, api_keys=("key-d",))
    assert ApiKeys(collect_keys(http)).check("Bearer key-d").scopes == ALL_SCOPES
    assert "key-d" not in repr(http)
    with pytest.raises(ConfigurationError, match=r"api_keys\[0\] also appears in the API key file"):
        collect_keys(replace(http, api_keys=("key-a",)))
    with pytest.raises(ConfigurationError, match=r"api_keys\[1\]: the same key"):
        collect_keys(HttpSettings(api_keys=("x", "x")))


def test_the_server_accepts_keys_made_by_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments, name in (([], "k"), (["--tenant", "acme", "--scope", "generate"], "k.toml")):
        result = runner.invoke(cli, ["key", *arguments])
        assert result.exit_code == 0
        secret = result.stderr.split()[-1]
        assert secret not in result.stdout
        (tmp_path / name).write_text(result.stdout)
        caller = ApiKeys(read_keys(tmp_path / name)).check(f"Bearer {secret}")
        assert (caller.scopes == {Scope.GENERATE}) == bool(arguments)
    assert caller.tenant == "acme"
    refused = runner.invoke(cli, ["key", "--scope", "everything"])
    assert refused.exit_code == 1
    assert "everything" in refused.stderr
    assert new_key()[0] != new_key()[0]


async def test_a_changed_file_is_read_again(
    client: httpx.AsyncClient, app: FastAPI, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def status(key: str) -> int:
        return (await client.get("/v1/models", headers=bearer(key))).status_code

    async def counted(outcome: str) -> bool:
        text = (await client.get("/metrics", headers=bearer("key-c"))).text
        return f'prelude_api_key_reloads_total{{outcome="{outcome}"}} 1.0' in text

    assert (await status("key-a"), await status("key-e")) == (200, 401)
    key_file.write_text(ENTRIES.replace("key-a", "key-e"))  # noqa: ASYNC240 - a small file
    await until(lambda: counted("success"))
    assert (await status("key-a"), await status("key-e")) == (401, 200)
    key_file.write_text("keys = [")  # noqa: ASYNC240 - a small file
    await until(lambda: counted("failure"))
    assert await status("key-e") == 200
    assert "the API keys were not reloaded" in caplog.text
    assert [mark.kind for mark in app.state.services.load.marks] == ["keys_reloaded"]


async def test_sighup_reads_the_file_again(client: httpx.AsyncClient) -> None:
    os.kill(os.getpid(), signal.SIGHUP)

    async def counted() -> bool:
        text = (await client.get("/metrics", headers=bearer("key-c"))).text
        return 'prelude_api_key_reloads_total{outcome="success"} 1.0' in text

    await until(counted)


def methods_and_paths(app: FastAPI) -> list[tuple[str, str]]:
    """Every route, included routers' too; fails if something without methods is mounted."""
    routes = iter_route_contexts(app.routes)
    return [(method, present(route.path)) for route in routes for method in sorted(present(route.methods))]


def test_every_route_has_an_operation(app: FastAPI) -> None:
    served = set(methods_and_paths(app))
    assert ("POST", "/v1/completions") in served
    assert served == operations_of(app).keys()


async def test_a_key_may_use_exactly_its_scopes(app: FastAPI, client: httpx.AsyncClient) -> None:
    may = {"key-a": {"generate", "prompts:read"}, "key-b": {"prompts:write"}, "key-c": {"admin"}}
    for (method, path), operation in operations_of(app).items():
        needed = operation.scopes
        if needed is None:
            continue
        url = path.replace("{version}", "1").replace("{model_id:path}", "x/y").replace("{", "").replace("}", "")
        for key, scopes in may.items():
            is_refused = bool(needed) and not needed & scopes
            if path == "/v1/events" and not is_refused:
                continue  # its stream does not end
            response = await client.request(method, url, headers=bearer(key))
            assert (response.status_code == 403) == is_refused, (method, path, key)
            if is_refused and method != "HEAD":
                error = response.json()["error"]
                assert (error["code"], error["type"]) == ("insufficient_scope", "invalid_request_error")
                assert f'scope="{" ".join(sorted(needed))}"' in response.headers["www-authenticate"]


@pytest.mark.parametrize("is_open", [False, True])
async def test_only_metrics_are_open_where_the_operator_opens_them(
    make_app: MakeApp, settings: Settings, tmp_path: Path, is_open: bool
) -> None:
    changed = replace(settings, http=replace(settings.http, open_metrics=is_open))
    app = locked(make_app, changed, tmp_path / "keys", "k")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        for method in ("GET", "HEAD"):
            assert (await client.request(method, "/metrics")).status_code == (200 if is_open else 401)
        assert (await client.post("/metrics")).status_code == (405 if is_open else 401)
        for path in ("/v1/models", "/v1/prompts", "/metrics/", "//metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/metrics", headers=bearer("k"))).status_code == 200


@pytest.mark.parametrize("path", ["/no-such", "/v1/", "/live/", "//v1/models", "/v1/prompts/../metrics"])
async def test_a_route_without_operation_is_not_served(app: FastAPI, client: httpx.AsyncClient, path: str) -> None:
    @app.get("/no-such")
    async def forgotten() -> str:
        return "a route that was added later"

    response = await client.get(path, headers=bearer("key-c"))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_a_route_without_operation_fails_at_start_up(
    make_app: Callable[[Settings], FastAPI], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = APIRouter()

    @router.get("/no-such")
    async def forgotten() -> str:
        return "a route without operation"

    monkeypatch.setattr("server.app.ROUTERS", (*ROUTERS, router))
    with pytest.raises(TypeError, match=r"/no-such.* has no operation"):
        make_app(settings)


def test_a_mounted_application_fails_at_start_up(
    make_app: Callable[[Settings], FastAPI], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = APIRouter()
    router.mount("/other", FastAPI())
    monkeypatch.setattr("server.app.ROUTERS", (*ROUTERS, router))
    with pytest.raises(TypeError, match="has no operation"):
        make_app(settings)


async def test_a_wrong_method_is_405(client: httpx.AsyncClient) -> None:
    response = await client.delete("/v1/models", headers=bearer("key-c"))
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"] == "GET"
