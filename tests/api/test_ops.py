"""Probes, metrics, keys, request ids, docs and the standard error body."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.api.keys.key_file import parse_plain, read_keys
from server.api.keys.keys import ApiKeys, is_loopback, load_keys
from server.config import HttpSettings, Settings
from server.errors import AuthenticationError, ConfigurationError
from tests.support.api_fixtures import CountingStore, MakeApp
from tests.support.live_server import LiveServer

pytestmark = pytest.mark.anyio


async def test_probes_report_liveness_and_readiness(client: httpx.AsyncClient) -> None:
    assert (await client.get("/live")).json() == {"status": "live"}
    for path in ("/ready", "/health"):
        assert (await client.get(path)).json() == {"status": "ready", "store": "available"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/no-such", 404, "not_found"),
        ("GET", "/v1/", 404, "not_found"),
        ("GET", "/live/", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/live", 405, "method_not_allowed"),
    ],
)
async def test_unknown_paths_and_methods_have_the_standard_error_body(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    error = response.json()["error"]
    assert response.status_code == status
    assert (error["code"], error["type"], error["param"]) == (code, "invalid_request_error", None)
    assert "detail" not in response.json()
    assert response.headers["x-request-id"]


async def test_a_bug_is_a_500_without_its_text(
    client: httpx.AsyncClient, store: CountingStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(store, "list_prompts", broken)
    response = await client.get("/v1/prompts", headers={"x-request-id": "abc-1"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "abc-1"
    assert "abc-1" in caplog.text
    assert "a secret" in caplog.text


@pytest.mark.parametrize("path", ["/live", "/no-such", "/metrics", "/v1/models", "/docs"])
async def test_request_ids_are_returned(client: httpx.AsyncClient, path: str) -> None:
    first, second = [(await client.get(path)).headers["x-request-id"] for _ in range(2)]
    assert len(first) == 32
    assert first != second
    echoed = await client.get(path, headers={"x-request-id": "trace_1.2:3/4"})
    assert echoed.headers["x-request-id"] == "trace_1.2:3/4"


@pytest.mark.parametrize("bad", ["", "x" * 129, "a b", 'a"b', "a\tb"])
async def test_bad_request_ids_are_replaced(client: httpx.AsyncClient, bad: str) -> None:
    assert (await client.get("/live", headers={"x-request-id": bad})).headers["x-request-id"] != bad


async def test_streams_carry_a_request_id(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert len(response.headers["x-request-id"]) == 32


async def test_the_docs_are_served(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/redoc"):
        response = await client.get(path)
        assert (response.status_code, response.headers["location"]) == (307, "/console#/api")
    schema = (await client.get("/openapi.json")).json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/prompts", "/live", "/metrics"} <= set(schema["paths"])
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("CompletionBody")


async def test_metrics_are_served(client: httpx.AsyncClient, sentiment: str) -> None:
    await client.post("/v1/completions", json={"prompt": "a", "model": sentiment})
    await client.post("/v1/completions", json={"prompt": "a", "model": "no-such"})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = set(response.text.splitlines())
    assert {
        'prelude_requests_total{outcome="stop",prompt="sentiment",version="1"} 1.0',
        'prelude_request_errors_total{code="model_not_found"} 1.0',
        "prelude_time_to_first_token_seconds_count 1.0",
        "prelude_inter_token_latency_seconds_count 11.0",
        "prelude_e2e_request_latency_seconds_count 1.0",
        "prelude_soft_prompts_registered 1.0",
        "prelude_soft_prompt_versions 1.0",
        "prelude_kv_cache_usage_ratio 0.5",
        "prelude_batch_distinct_prompts_max 3.0",
    } <= lines


async def test_metrics_are_served_as_openmetrics(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_metrics_answer_head(client: httpx.AsyncClient) -> None:
    assert (await client.head("/metrics")).status_code == 200


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# tenants\n\n  first-key  \nschlüssel-2\n", encoding="utf-8")
    return path


@pytest.fixture
def app(make_app: MakeApp, settings: Settings, request: pytest.FixtureRequest) -> FastAPI:
    """An application, with keys if a test requests the fixture."""
    if "key_file" in request.fixturenames:
        key_file = request.getfixturevalue("key_file")
        settings = replace(settings, http=replace(settings.http, api_key_file=key_file))
    return make_app(settings)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "first-key", "Basic first-key", "Bearer ", "Bearer # tenants"]
)
async def test_a_request_without_a_valid_key_is_401(
    key_file: Path, client: httpx.AsyncClient, header: str | None
) -> None:
    for path in ("/v1/models", "/v1/prompts", "/metrics", "/openapi.json", "/no-such"):
        response = await client.get(path, headers={"authorization": header} if header else {})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize("key", ["first-key", "schlüssel-2"])
async def test_a_request_with_a_valid_key_is_served(key_file: Path, client: httpx.AsyncClient, key: str) -> None:
    headers = {b"authorization": f"Bearer {key}".encode()}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_probes_need_no_key(key_file: Path, client: httpx.AsyncClient) -> None:
    for path in ("/live", "/ready", "/health"):
        assert (await client.get(path)).status_code == 200


def test_keys_are_not_stored_as_plain_text(key_file: Path) -> None:
    assert "first-key" not in str(vars(ApiKeys(read_keys(key_file))))
    with pytest.raises(AuthenticationError):
        ApiKeys(parse_plain([("here", "a")])).check(None)


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe"])
def test_bad_key_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="API key file"):
        load_keys(HttpSettings(api_key_file=path))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])  # noqa: S104
def test_open_hosts_need_keys(host: str, key_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="api-key-file"):
        load_keys(HttpSettings(host=host))
    assert load_keys(HttpSettings(host=host, api_key_file=key_file)) is not None
    assert load_keys(HttpSettings(host=host, api_keys=("k",))) is not None


def test_an_open_host_without_keys_needs_an_explicit_setting(caplog: pytest.LogCaptureFixture) -> None:
    assert load_keys(HttpSettings(host="0.0.0.0", allow_open=True)) is None  # noqa: S104
    assert "OPEN SERVER" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_addresses_are_recognised(host: str) -> None:
    assert is_loopback(host)
    assert load_keys(HttpSettings(host=host)) is None


def test_head_has_no_body(live: LiveServer) -> None:
    with httpx.Client() as http:
        response = http.head(f"{live.url}/metrics")
        assert (response.status_code, response.content) == (200, b"")
        assert http.get(f"{live.url}/live").status_code == 200
