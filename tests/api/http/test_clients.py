"""HTTP clients with default settings: installed ones run, and captured requests of others are replayed."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests

PATH = "/v1/completions"
BODY = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 20})
TEXT = "hello world"
HTTP2_OF_CURL = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
HTTP2_OF_JAVA = b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\nUpgrade: h2c\r\n"

# Heads of curl 7.88, OpenJDK 17 and Node 20 are captured; those of Go, .NET and aiohttp follow their sources.
LENGTH, CHUNKED = b"Content-Length: %d\r\n" % len(BODY), b"Transfer-Encoding: chunked\r\n"
POST, JSON = b"POST /v1/completions HTTP/1.1\r\n", b"Content-Type: application/json\r\n"
SENT: dict[str, bytes] = {
    "curl": POST + b"Host: %(host)s\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n" + JSON + LENGTH,
    "curl, HTTP/2": POST
    + b"Host: %(host)s\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
    + HTTP2_OF_CURL
    + JSON.lower()
    + LENGTH,
    "curl, large": POST
    + b"Host: %(host)s\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
    + LENGTH
    + JSON
    + b"Expect: 100-continue\r\n",
    "Go": POST
    + b"Host: %(host)s\r\nUser-Agent: Go-http-client/1.1\r\n"
    + LENGTH
    + JSON
    + b"Accept-Encoding: gzip\r\n",
    "Go, reader": POST
    + b"Host: %(host)s\r\nUser-Agent: Go-http-client/1.1\r\n"
    + CHUNKED
    + JSON
    + b"Accept-Encoding: gzip\r\n",
    "Java": POST
    + b"Connection: Upgrade, HTTP2-Settings\r\n"
    + LENGTH
    + b"Host: %(host)s\r\n"
    + HTTP2_OF_JAVA
    + b"User-Agent: Java-http-client/17.0.15\r\n"
    + JSON,
    "Java, stream": POST
    + b"Connection: Upgrade, HTTP2-Settings\r\nHost: %(host)s\r\n"
    + HTTP2_OF_JAVA
    + b"Transfer-encoding: chunked\r\nUser-Agent: Java-http-client/17.0.15\r\n"
    + JSON,
    ".NET, StringContent": POST + b"Host: %(host)s\r\nContent-Type: application/json; charset=utf-8\r\n" + LENGTH,
    ".NET, JsonContent": POST
    + b"Host: %(host)s\r\n"
    + CHUNKED
    + b"Content-Type: application/json; charset=utf-8\r\n",
    ".NET Framework": POST
    + b"Content-Type: application/json; charset=utf-8\r\nHost: %(host)s\r\n"
    + LENGTH
    + b"Expect: 100-continue\r\nConnection: Keep-Alive\r\n",
    "undici": POST
    + b"host: %(host)s\r\nconnection: keep-alive\r\n"
    + JSON.lower()
    + b"accept: */*\r\naccept-language: *\r\nsec-fetch-mode: cors\r\nuser-agent: node\r\n"
    + b"accept-encoding: gzip, deflate\r\n"
    + LENGTH.lower(),
    "undici, stream": POST
    + b"host: %(host)s\r\nconnection: keep-alive\r\n"
    + JSON.lower()
    + b"accept: */*\r\naccept-language: *\r\nsec-fetch-mode: cors\r\nuser-agent: node\r\n"
    + b"accept-encoding: gzip, deflate\r\n"
    + CHUNKED.lower(),
    "aiohttp": POST
    + b"Host: %(host)s\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
    + b"User-Agent: Python/3.11 aiohttp/3.9.5\r\n"
    + LENGTH
    + JSON,
}


def framed(head: bytes) -> bytes:
    body = BODY.encode()
    if b"chunked" not in head:
        return body
    return b"%X\r\n" % 10 + body[:10] + b"\r\n%x\r\n" % (len(body) - 10) + body[10:] + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("form", SENT.values(), ids=SENT.keys())
def test_captured_client_requests_are_served(live: Any, form: bytes) -> None:
    """Three requests on one connection, each sent after the previous answer."""
    netloc = httpx.URL(live.url).netloc
    head = form % {b"host": netloc} + b"\r\n"
    with _connection(live) as connection:
        reader = connection.makefile("rb")
        for _ in range(3):
            if b"100-continue" in head:
                connection.sendall(head)
                assert reader.readline() == b"HTTP/1.1 100 Continue\r\n"
                assert reader.readline() == b"\r\n"
                connection.sendall(framed(head))
            else:
                connection.sendall(head + framed(head))
            assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = http.client.parse_headers(reader)
            assert "upgrade" not in headers
            assert headers.get("connection") is None
            answer = json.loads(reader.read(int(headers["content-length"])))
            assert answer["choices"][0]["text"] == TEXT


def _connection(live: Any) -> Any:
    url = httpx.URL(live.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=20)
    connection.connect()
    return connection.sock


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

public class Client {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int number = 0; number < 2; number++) {
            var request = HttpRequest.newBuilder(URI.create(arguments[0])).header("Content-Type", "application/json")
                .POST(BodyPublishers.ofString(arguments[1])).build();
            System.out.println(client.send(request, BodyHandlers.ofString()).body());
        }
    }
}
"""
NODE = """
const [url, body] = process.argv.slice(1);
(async () => {
  for (const sent of [body, new Blob([body]).stream()]) {
    const answer = await fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body: sent,
                                     duplex: "half"});
    console.log(await answer.text());
  }
})();
"""
CURL = ("curl", "--silent", "--show-error", "--header", "Content-Type: application/json", "--data", BODY)


def _curl(url: str, _: Path) -> list[str]:
    expecting = ("--header", "Expect: 100-continue")
    return [
        run(*CURL, *more, url)
        for more in ((), ("--http2",), ("--http1.0",), expecting, ("--header", "Transfer-Encoding: chunked"))
    ]


def _node(url: str, _: Path) -> list[str]:
    return run("node", "-e", NODE, url, BODY).splitlines()


def _java(url: str, folder: Path) -> list[str]:
    (folder / "Client.java").write_text(JAVA)
    return run("java", str(folder / "Client.java"), url, BODY).splitlines()


def _urllib(url: str, _: Path) -> list[str]:
    request = urllib.request.Request(url, BODY.encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
        return [answer.read().decode()]


def _requests(url: str, _: Path) -> list[str]:
    with requests.Session() as session:
        return [
            session.post(url, data=data, headers={"Content-Type": "application/json"}, timeout=20).text
            for data in (BODY, iter([BODY[:9].encode(), BODY[9:].encode()]))
        ]


def _httpx(url: str, _: Path) -> list[str]:
    with httpx.Client(headers={"content-type": "application/json"}) as client:
        return [client.post(url, content=content).text for content in (BODY, iter([BODY.encode()]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "ask"),
    [("curl", _curl), ("node", _node), ("java", _java), ("", _urllib), ("", _requests), ("", _httpx)],
    ids=["curl", "node", "java", "urllib", "requests", "httpx"],
)
def test_installed_clients_are_served(
    live: Any, tmp_path: Path, program: str, ask: Callable[[str, Path], list[str]]
) -> None:
    if program and shutil.which(program) is None:
        pytest.skip(f"needs {program}; its captured requests are replayed")
    answers = ask(live.url + PATH, tmp_path)
    assert answers
    for answer in answers:
        assert json.loads(answer)["choices"][0]["text"] == TEXT


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    ("http", "path", "form", "status", "code"),
    [
        (
            {"api_keys": ("k" * 40,)},
            "/v1/prompts",
            ("--form", "id=x", "--form", "files=@{file}"),
            401,
            "invalid_api_key",
        ),
        (
            {},
            "/v1/completions",
            ("--header", "Content-Type: application/json", "--data-binary", "@{file}"),
            413,
            None,
        ),
        ({}, "/v1/completions", ("--header", "Origin: null", "--data-binary", "@{file}"), 403, "cross_origin"),
    ],
)
def test_curl_sends_no_body_that_is_refused(
    serve: Any, tmp_path: Path, http: dict[str, Any], path: str, form: tuple[str, ...], status: int, code: str | None
) -> None:
    live = serve(**http)
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    sent = [argument.replace("{file}", str(tmp_path / "large")) for argument in form]
    refused = run(
        *("curl", "--silent", "--show-error", "--expect100-timeout", "20", "--header", "Expect: 100-continue", *sent),
        *("--output", str(tmp_path / "answer"), "--write-out", "%{http_code} %{size_upload}", live.url + path),
    )
    assert refused == f"{status} 0"
    assert json.loads((tmp_path / "answer").read_text())["error"]["code"] == (code or "payload_too_large")
