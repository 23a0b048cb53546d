"""What pages of other origins may send and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers

from server.api.http.origins import EXPOSED_HEADERS, METHODS, Origins, is_foreign
from server.config import Settings
from server.errors import ConfigurationError
from tests.support.in_process import is_ready
from tests.support.keyed import bearer, locked
from tests.support.waiting import until

EVIL = "https://evil.example"
OWN = "http://localhost"
PAGE = "https://page.example"


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),
        ({"sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site"}, True),
        ({"sec-fetch-site": "new-word"}, True),
        ({"sec-fetch-site": ""}, True),
        ({"sec-fetch-site": "same-origin", "origin": EVIL}, False),
        ({"sec-fetch-site": "same-origin", "origin": "null"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://a.example"}, True),
        ({"origin": "http://a.example"}, False),
        ({"origin": "https://A.example"}, False),
        ({"origin": "http://a.example:8000"}, True),
        ({"origin": "http://a.example.evil.example"}, True),
        ({"origin": "http://a.example@evil.example"}, True),
        ({"origin": EVIL}, True),
        ({"origin": "null"}, True),
        ({"origin": ""}, True),
        ({"origin": "a.example"}, True),
        ({"origin": "http://"}, True),
        ({"host": "a.example:8000", "origin": "http://a.example:8000"}, False),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, False),
        ({"host": "", "origin": "file://"}, True),
    ],
)
def test_foreign_origins_are_recognised(headers: Mapping[str, str], foreign: bool) -> None:
    assert is_foreign(Headers({"host": "a.example", **headers})) is foreign


def test_one_foreign_value_among_several_makes_a_request_foreign() -> None:
    for name, own, other in (("sec-fetch-site", b"same-origin", b"cross-site"), ("origin", b"http://a", b"http://b")):
        raw = [(b"host", b"a"), (name.encode(), own), (name.encode(), other)]
        assert is_foreign(Headers(raw=raw))


@pytest.mark.parametrize(
    "url",
    ["*", "null", "", "a.example", "http://", "http://a.example/path", "http://a b", "http://*.a", "//a", "http:a"],
)
def test_bad_origins_are_refused_in_the_settings(
    make_app: Callable[[Settings], FastAPI], settings: Settings, url: str
) -> None:
    with pytest.raises(ConfigurationError, match="--allow-origin"):
        make_app(replace(settings, http=replace(settings.http, allow_origin=(url,))))


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("http://localhost:3000", "http://localhost:3000"),
        ("HTTP://LocalHost:3000/", "http://localhost:3000"),
        ("https://a.example:443", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("tauri://localhost", "tauri://localhost"),
    ],
)
def test_configured_origins_are_normalised_to_the_browsers_form(given: str, sent: str) -> None:
    origins = Origins([given])
    assert sent in origins
    for other in ("null", "", None, EVIL, sent + ":1", sent + ".evil.example", sent.replace("://", "://x.")):
        assert other not in origins


async def upload(client: httpx.AsyncClient, parts: Any, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/v1/prompts", **parts, headers=named)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL, "sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"origin": "http://localhost:8080", "sec_fetch_site": "same-site"},
        {"origin": EVIL},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
    ],
)
async def test_a_page_of_another_origin_changes_nothing(
    client: httpx.AsyncClient, upload_parts: Callable[..., Any], store: Any, headers: dict[str, str]
) -> None:
    response = await upload(client, upload_parts("sentiment"), **headers)
    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "cross_origin", None)
    assert response.headers["x-request-id"]
    assert "access-control-allow-origin" not in response.headers
    assert "vary" not in response.headers
    assert store.totals().num_prompts == 0
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("/v1/completions", "/v1/prompts/a", "/v1/prompts/a/aliases/latest", "/no-such", "/live"):
            assert (await client.request(method, path, headers=named)).status_code == 403
    for method in ("GET", "HEAD", "OPTIONS"):
        assert (await client.request(method, "/v1/models", headers=named)).status_code in {200, 405}
    assert 'prelude_request_errors_total{code="cross_origin"} 21.0' in (await client.get("/metrics")).text


@pytest.mark.anyio
async def test_same_origin_pages_and_other_clients_are_served(
    client: httpx.AsyncClient, upload_parts: Callable[..., Any]
) -> None:
    for headers in (
        {},
        {"origin": OWN},
        {"sec_fetch_site": "same-origin", "origin": OWN},
        {"sec_fetch_site": "none"},
    ):
        assert (await upload(client, upload_parts("sentiment"), **headers)).is_success


@pytest.mark.anyio
async def test_a_body_is_not_read_before_the_refusal(app: FastAPI) -> None:
    sent = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"origin", b"null"), (b"content-length", b"100000000")]
    scope = {"type": "http", "method": "POST", "path": "/v1/prompts", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == 403


@pytest.mark.anyio
async def test_a_page_with_a_key_still_needs_an_allowed_origin(
    make_app: Callable[[Settings], FastAPI], settings: Settings, tmp_path: Path
) -> None:
    app = locked(make_app, settings, tmp_path / "keys", "secret\n")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a.example") as client:
        for more in ({}, bearer("secret")):
            response = await client.delete("/v1/prompts/a", headers={"origin": EVIL, **more})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "cross_origin")
        assert (await client.delete("/v1/prompts/a")).status_code == 401
        assert (await client.options("/v1/prompts/a", headers={"origin": EVIL})).status_code == 401


def allowing(
    make_app: Callable[[Settings], FastAPI], settings: Settings, **http: Any
) -> tuple[FastAPI, httpx.AsyncClient]:
    changed = replace(settings, http=replace(settings.http, allow_origin=(PAGE,), **http))
    app = make_app(changed)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return app, httpx.AsyncClient(transport=transport, base_url=OWN)


def assert_readable(response: httpx.Response) -> None:
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["vary"].count("Origin") == 1
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.anyio
async def test_an_allowed_origin_may_send_and_read(
    make_app: Callable[[Settings], FastAPI], settings: Settings, upload_parts: Callable[..., Any], engine: Any
) -> None:
    app, client = allowing(make_app, settings)
    page = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    async with app.router.lifespan_context(app), client:
        await until(lambda: is_ready(client))
        assert_readable(await upload(client, upload_parts("sentiment"), origin=PAGE, sec_fetch_site="cross-site"))
        body = {"model": "sentiment", "prompt": "abc", "stream": True}
        stream = await client.post("/v1/completions", json=body, headers=page)
        assert_readable(stream)
        assert stream.text.endswith("data: [DONE]\n\n")
        exposed = stream.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} < set(exposed)
        for path, status in (("/v1/models", 200), ("/no-such", 404), ("/metrics", 200)):
            response = await client.get(path, headers=page)
            assert response.status_code == status
            assert_readable(response)
        for content, status in (("{", 400), (b"x" * 100_000, 413)):
            response = await client.post(
                "/v1/completions", content=content, headers=page | {"content-type": "application/json"}
            )
            assert response.status_code == status
            assert_readable(response)
        engine.failure, engine.fail_after = ZeroDivisionError("a bug"), 0
        response = await client.post("/v1/completions", json=body, headers=page)
        assert response.status_code == 500
        assert_readable(response)
        for origin in (EVIL, "null", PAGE + ":8443"):
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/models")):
                response = await client.request(method, path, headers={"origin": origin})
                assert "access-control-allow-origin" not in response.headers
                assert response.headers["vary"] == "Origin"
                assert method != "POST" or response.status_code == 403
        assert (await client.get("/v1/models")).headers["vary"] == "Origin"


@pytest.mark.anyio
async def test_an_allowed_origin_may_read_refusals(
    make_app: Callable[[Settings], FastAPI], settings: Settings, engine: Any
) -> None:
    _, client = allowing(make_app, settings, api_keys=("k" * 40,))
    async with client:
        response = await client.post("/v1/completions", json={}, headers={"origin": PAGE})
        assert response.status_code == 401
        assert_readable(response)
        response = await client.post("/v1/completions", json={}, headers={"origin": PAGE, **bearer("k" * 40)})
        assert response.status_code == 503  # the server is not started
        assert_readable(response)
    _, client = allowing(make_app, settings, max_body_bytes=10)
    async with client:
        response = await client.get("/v1/models", headers={"origin": PAGE, "host": "evil.example"})
        assert response.status_code == 421
        assert_readable(response)


@pytest.mark.anyio
async def test_preflights_are_answered_for_allowed_origins(
    make_app: Callable[[Settings], FastAPI], settings: Settings
) -> None:
    _, client = allowing(make_app, settings, api_keys=("k" * 40,))
    asked = {"access-control-request-method": "DELETE"}
    names = "authorization,content-type,x-stainless-os"
    async with client:
        for path in ("/v1/completions", "/v1/prompts/a/aliases/latest"):
            response = await client.options(
                path, headers={"origin": PAGE, **asked, "access-control-request-headers": names}
            )
            assert (response.status_code, response.content) == (204, b"")
            assert_readable(response)
            assert response.headers["access-control-allow-methods"] == METHODS
            assert response.headers["access-control-allow-headers"] == names
            assert int(response.headers["access-control-max-age"]) > 0
            assert response.headers["x-request-id"]
            assert "access-control-allow-private-network" not in response.headers
        private = {"access-control-request-private-network": "true"}
        response = await client.options("/v1/models", headers={"origin": PAGE, **asked, **private})
        assert response.headers["access-control-allow-private-network"] == "true"
        assert "access-control-allow-headers" not in response.headers
        response = await client.options(
            "/v1/models", headers={"origin": PAGE, **asked, "access-control-request-headers": "a(b)"}
        )
        assert "access-control-allow-headers" not in response.headers
        for origin in (EVIL, "null"):
            response = await client.options("/v1/models", headers={"origin": origin, **asked, **private})
            assert response.status_code == 401
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_every_custom_header_is_exposed() -> None:
    """Each name is also looked up in the sources, so that the list does not go out of date."""
    root = Path(__file__).parents[3] / "server"
    text = "".join(path.read_text() for path in root.rglob("*.py"))
    for name in ("retry-after-ms", "x-should-retry", "x-prelude-prompt", "www-authenticate", "content-disposition"):
        assert f'"{name}"' in text
        assert name in EXPOSED_HEADERS
