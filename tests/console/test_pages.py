"""The files of the console, and their headers."""

from __future__ import annotations

import gzip
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

from server.console.pages import INDEX, Pages
from server.errors import NotFoundError
from tests.support.keyed import key_entry

KEYS = key_entry("reader")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PLAIN, BROWSER = Headers(), Headers({"accept-encoding": "gzip, deflate, br, zstd"})


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    (tmp_path / "assets").mkdir()
    files = {
        INDEX: b"<!doctype html>",
        "icon.svg": b"<svg/>",
        "assets/app-ABC123.js": b"let a",
        "assets/app-ABC123.js.br": b"BR",
        "assets/app-ABC123.js.gz": gzip.compress(b"let a"),
        "assets/font-D.woff2": b"\x00",
    }
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    return Pages(tmp_path)


@pytest.mark.parametrize("path", [INDEX, "", "prompts", "prompts/a/b", "no such page"])
def test_the_page_answers_every_path_without_a_dot(pages: Pages, path: str) -> None:
    response = pages.answer(path, BROWSER)
    assert (response.status_code, response.body) == (200, b"<!doctype html>")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize("path", ["assets/app-OLD.js", "assets/app-ABC123.js.br", "../pages.py", "/etc/x.conf"])
def test_a_missing_file_is_404(pages: Pages, path: str) -> None:
    with pytest.raises(NotFoundError):
        pages.answer(path, PLAIN)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip, deflate, br", "br"),
        ("GZIP", "gzip"),
        ("br;q=0, gzip;q=0.5", "gzip"),
        ("br; q=0.000", None),
        ("identity", None),
        ("", None),
        ("zstd, x-br", None),
    ],
)
def test_the_best_coding_that_the_client_accepts_is_sent(pages: Pages, accepted: str, coding: str | None) -> None:
    response = pages.answer("assets/app-ABC123.js", Headers({"accept-encoding": accepted}))
    bodies = {"br": b"BR", "gzip": gzip.compress(b"let a"), None: b"let a"}
    sent = bytes(response.body)
    assert (gzip.decompress(sent) if coding == "gzip" else sent) == (b"let a" if coding == "gzip" else bodies[coding])
    assert response.headers.get("content-encoding") == coding
    assert response.headers["vary"] == "Accept-Encoding"
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"


def test_a_file_that_the_client_has_is_not_sent_again(pages: Pages) -> None:
    tag = pages.answer("icon.svg", PLAIN).headers["etag"]
    response = pages.answer("icon.svg", Headers({"if-none-match": f'"x", {tag}'}))
    assert (response.status_code, response.body) == (304, b"")
    assert response.headers["content-security-policy"] == POLICY
    compressed = pages.answer("assets/app-ABC123.js", BROWSER).headers["etag"]
    assert compressed != pages.answer("assets/app-ABC123.js", PLAIN).headers["etag"]


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/console", "/console/", "/console/prompts/x"])
async def test_the_page_needs_no_key_and_has_its_policy(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert (await client.request("POST", "/console/prompts")).status_code == 405


@pytest.mark.anyio
async def test_browsers_are_sent_from_the_root_to_the_console(client: httpx.AsyncClient) -> None:
    accept = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    response = await client.get("/", headers=accept)
    assert (response.status_code, response.headers["location"]) == (307, "/console")
    assert (await client.get("/", headers={"accept": "*/*"})).status_code == 401
    assert (await client.get("/", headers={"authorization": "Bearer reader"})).status_code == 404
    assert (await client.post("/", headers=accept)).status_code == 401
    assert (await client.get("/v1/models", headers=accept)).status_code == 401
