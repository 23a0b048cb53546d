"""Connection limits of a real server: heads, bodies and answers that are too slow, too large or too many."""

from __future__ import annotations

import json
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server import app as server_app
from server.api.http.connections import MAX_HEADERS, MAX_PIPELINED
from tests.support.log_records import fields_of

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def connect() -> Iterator[Callable[..., socket.socket]]:
    with ExitStack() as stack:

        def connect_to(live: Any, *, buffer: int | None = None) -> socket.socket:
            address = urlsplit(live.url)
            connection = stack.enter_context(socket.socket())
            connection.settimeout(60)
            if buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.connect((address.hostname, address.port))
            return connection

        yield connect_to


def everything(connection: socket.socket) -> bytes:
    """All bytes until the other side closes."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def error_of(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"x-request-id: " in head
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


def counted(live: Any, code: str) -> bool:
    return f'prelude_request_errors_total{{code="{code}"}}' in httpx.get(f"{live.url}/metrics").text


def logged(caplog: pytest.LogCaptureFixture, code: str) -> dict[str, Any]:
    """The fields of the only line with a code."""
    lines = [fields_of(record) for record in caplog.records]
    (fields,) = [fields for fields in lines if fields.get("error") == code]
    return fields


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", 414, "uri_too_long"),
        (HEAD + b"X: " + b"a" * 3000 + b"\r\n\r\n", 431, "headers_too_large"),
        (HEAD + b"X: " + b"a" * 3000, 431, "headers_too_large"),
        (HEAD + b"X" * 3000, 431, "headers_too_large"),
        (HEAD + b"X:y\r\n" * MAX_HEADERS + b"\r\n", 431, "headers_too_large"),
        (b"\x16\x03\x01 is no HTTP\r\n\r\n", 400, "invalid_request"),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "invalid_request"),
        (b"GET http://x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "invalid_request"),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Content-Length: " + b"9" * 1000 + b"\r\n\r\n", 400, "invalid_request"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n", 400, "invalid_request"),
    ],
    ids=[
        *("target", "header", "endless header", "endless name", "number", "no HTTP"),
        *("no URL", "no path", "no proxy", "huge length", "no chunk"),
    ],
)
def test_bad_heads_are_refused(
    serve: Any,
    connect: Callable[..., socket.socket],
    caplog: pytest.LogCaptureFixture,
    sent: bytes,
    status: int,
    code: str,
) -> None:
    live = serve(max_head_bytes=2048)
    connection = connect(live)
    with caplog.at_level(logging.INFO, "server.api.http.refusal_log"):
        connection.sendall(sent)
        answer = everything(connection)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert error_of(answer, status) == code
    assert counted(live, code)
    fields = logged(caplog, code)
    assert (fields["status"], fields["client"]) == (status, "127.0.0.1")
    assert f"x-request-id: {fields['request_id']}".encode() in answer
    assert fields["reason"] == json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_slow_and_missing_heads_time_out(serve: Any, connect: Callable[..., socket.socket]) -> None:
    live = serve(head_timeout=0.5)
    slow, silent = connect(live), connect(live)
    began = time.monotonic()
    with pytest.raises(OSError):  # noqa: PT011 - the kernel chooses the error: the other side has closed
        for byte in HEAD * 100:
            slow.sendall(bytes([byte]))
            time.sleep(0.02)
    assert everything(silent) == b""
    assert 0.4 < time.monotonic() - began < 5
    assert counted(live, "request_timeout")


def test_a_connection_without_a_request_is_logged_without_a_status(
    serve: Any, connect: Callable[..., socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.api.http.refusal_log")
    assert everything(connect(serve(head_timeout=0.2))) == b""
    assert logged(caplog, "request_timeout") == {
        "error": "request_timeout",
        "reason": "nothing was asked in time",
        "client": "127.0.0.1",
    }


def test_an_incomplete_head_is_408(serve: Any, connect: Callable[..., socket.socket]) -> None:
    live = serve(head_timeout=0.3)
    connection = connect(live)
    connection.sendall(HEAD)
    assert error_of(everything(connection), 408) == "request_timeout"


def test_a_second_request_on_the_connection_has_the_same_limits(
    serve: Any, connect: Callable[..., socket.socket]
) -> None:
    connection = connect(serve(head_timeout=0.3))
    connection.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in connection.recv(4096)
    connection.sendall(b"GET /li")
    assert error_of(everything(connection), 408) == "request_timeout"


@pytest.mark.slow
def test_a_slow_body_after_an_early_answer_does_not_keep_the_connection(
    serve: Any, connect: Callable[..., socket.socket]
) -> None:
    live = serve(head_timeout=2.0, max_head_bytes=2048)
    connection = connect(live)
    connection.sendall(b"POST /no-such HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
    answer = connection.recv(4096)
    assert b"404 Not Found" in answer
    began = time.monotonic()
    with pytest.raises(OSError):  # noqa: PT011
        connection.sendall(b"x" * 10_000)  # a started body must not count as a large head
        while time.monotonic() - began < 30:
            connection.sendall(b"x")
            time.sleep(0.02)
    assert b"HTTP/1.1 431" not in answer + everything(connection)  # a request id may contain any three digits


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/prompts"])
def test_a_slow_body_is_408(serve: Any, connect: Callable[..., socket.socket], path: str, engine: Any) -> None:
    live = serve(body_timeout=0.4)
    connection = connect(live)
    kind = b"application/json" if path == "/v1/completions" else b"multipart/form-data; boundary=b"
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: 1000\r\n\r\n"
    connection.sendall(head % (path.encode(), kind))
    connection.sendall(b'{"prompt": ' if path == "/v1/completions" else b"--b\r\n")
    assert error_of(everything(connection), 408) == "request_timeout"
    assert engine.requests == []
    assert live.server._services.admission.num_in_use == 0


def test_a_body_above_the_minimum_rate_may_take_longer(serve: Any, connect: Callable[..., socket.socket]) -> None:
    live = serve(body_timeout=0.4)
    connection = connect(live)
    body = json.dumps({"prompt": "abc", "max_tokens": 2, "user": "x" * 16_000}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
    for start in range(0, len(body), 2000):
        connection.sendall(body[start : start + 2000])
        time.sleep(0.1)
    assert b"200 OK" in everything(connection)


def test_a_fast_start_does_not_extend_the_allowed_silence(serve: Any, connect: Callable[..., socket.socket]) -> None:
    live = serve(body_timeout=0.4)
    connection = connect(live)
    began = time.monotonic()
    connection.sendall(HEAD + b"Content-Length: 60000\r\n\r\n" + b'{"prompt": "' + b"x" * 50_000)
    assert error_of(everything(connection), 408) == "request_timeout"
    assert time.monotonic() - began < 8, "50,000 bytes must not extend the timeout by twelve seconds"


def test_connections_over_the_limit_are_refused_until_one_closes(
    serve: Any, connect: Callable[..., socket.socket], eventually: Callable[..., None]
) -> None:
    live = serve(max_connections=3)
    held = [connect(live) for _ in range(3)]
    eventually(lambda: len(live.server.server_state.connections) == 3)
    refused = everything(connect(live))
    assert error_of(refused, 503) == "too_many_connections"
    assert b"retry-after: 1" in refused
    held[0].close()
    eventually(lambda: len(live.server.server_state.connections) < 3)
    assert counted(live, "too_many_connections")


@pytest.mark.slow
def test_an_unread_answer_is_abandoned(
    serve: Any,
    connect: Callable[..., socket.socket],
    engine: Any,
    eventually: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "server.api.http.refusal_log")
    live = serve(stall_timeout=0.5, max_waiting=1000)
    engine.reply = "x" * 200
    connection = connect(live, buffer=4096)
    body = json.dumps(
        {"prompt": ["x" * 50] * 32, "n": 4, "max_tokens": 190, "logprobs": 20, "ignore_eos": True}
    ).encode()
    connection.sendall(HEAD + b"X-Request-ID: stalled\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    eventually(lambda: counted(live, "client_stalled"), 60.0)
    assert logged(caplog, "client_stalled")["request_id"] == "stalled"
    eventually(lambda: live.server._services.admission.num_in_use == 0)
    eventually(lambda: not live.server.server_state.tasks)


@pytest.mark.slow
def test_a_slow_reader_gets_the_whole_answer(serve: Any, connect: Callable[..., socket.socket], engine: Any) -> None:
    live = serve(stall_timeout=0.5, max_waiting=1000)
    engine.reply = "x" * 200
    connection = connect(live, buffer=65536)
    body = json.dumps({"prompt": ["x" * 50] * 32, "n": 4, "max_tokens": 190, "logprobs": 20, "ignore_eos": True})
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body.encode())
    received = b""
    for _ in range(12):
        received += connection.recv(200_000)
        time.sleep(0.15)
    received += everything(connection)
    head, _, answer = received.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert len(json.loads(answer)["choices"]) == 128


def test_pipelined_requests_are_answered_in_order(serve: Any, connect: Callable[..., socket.socket]) -> None:
    connection = connect(serve())
    first, last = (
        b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /no HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    connection.sendall(first * 3 + last)
    answer = everything(connection)
    assert (answer.count(b"200 OK"), answer.count(b"404 Not Found")) == (3, 1)


def test_an_endless_head_after_a_running_stream_ends_both(
    serve: Any, connect: Callable[..., socket.socket], engine: Any, eventually: Callable[..., None]
) -> None:
    live = serve(max_head_bytes=2048)
    engine.reply, engine.stall_after = "x" * 200, 5
    connection = connect(live)
    body = json.dumps({"prompt": "abc", "max_tokens": 100, "stream": True}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert b"200 OK" in connection.recv(4096)
    connection.sendall(b"GET /live HTTP/1.1\r\nX: " + b"x" * 3000)
    assert b" 431 " not in everything(connection), "a 431 must not appear inside the stream"
    eventually(lambda: engine.in_flight == 0 and live.server._services.admission.num_in_use == 0)


def test_an_invalid_request_is_not_answered_in_place_of_the_one_before(
    serve: Any, connect: Callable[..., socket.socket], engine: Any, eventually: Callable[..., None]
) -> None:
    live = serve()
    engine.stall_after = 0
    connection = connect(live)
    body = json.dumps({"prompt": "abc"}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    eventually(lambda: engine.in_flight == 1)
    connection.sendall(b"no HTTP\r\n\r\n")
    assert everything(connection) == b""
    eventually(lambda: engine.in_flight == 0 and live.server._services.admission.num_in_use == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_with_pipelined_requests_aborts_the_running_one(
    serve: Any,
    connect: Callable[..., socket.socket],
    caplog: pytest.LogCaptureFixture,
    engine: Any,
    eventually: Callable[..., None],
    stream: bool,
) -> None:
    live = serve()
    engine.reply, engine.stall_after = "x" * 200, 5
    connection = connect(live)
    body = json.dumps({"prompt": "abc", "max_tokens": 100, "stream": stream}).encode()
    following = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + following * 3)
    eventually(lambda: engine.in_flight == 1)
    connection.close()
    eventually(lambda: engine.in_flight == 0 and live.server._services.admission.num_in_use == 0)
    eventually(lambda: not live.server.server_state.tasks)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_pipelined_requests_on_one_connection_are_limited(
    serve: Any,
    connect: Callable[..., socket.socket],
    caplog: pytest.LogCaptureFixture,
    engine: Any,
    eventually: Callable[..., None],
) -> None:
    live = serve()
    engine.stall_after = 0
    body = json.dumps({"prompt": "abc"}).encode()
    first = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    following = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    patient, greedy = connect(live), connect(live)
    patient.sendall(first + following * MAX_PIPELINED)
    eventually(lambda: engine.in_flight == 1)
    with caplog.at_level(logging.INFO, "server.api.http.refusal_log"):
        greedy.sendall(first + following * (MAX_PIPELINED + 1))
        assert everything(greedy) == b"", "the refusal must not replace another answer"
    assert logged(caplog, "too_many_pipelined")["reason"]
    assert counted(live, "too_many_pipelined")
    eventually(lambda: engine.in_flight == 1)
    engine.stall_after = None
    patient.close()
    eventually(lambda: engine.in_flight == 0)


def test_a_last_chunk_over_the_limit_is_refused_at_once(serve: Any, connect: Callable[..., socket.socket]) -> None:
    live = serve(max_body_bytes=1000)
    connection = connect(live)
    began = time.monotonic()
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5dc\r\n" + b"a" * 1500 + b"\r\n0\r\n\r\n")
    assert error_of(everything(connection), 413) == "payload_too_large"
    assert time.monotonic() - began < 4, "the server waited for more data"


def test_the_open_file_limit_is_raised_for_the_allowed_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    for soft, hard, expected in (
        (1024, 100_000, 4608),
        (1024, 2000, 2000),
        (1024, resource.RLIM_INFINITY, 4608),
        (50_000, 100_000, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ):
        limits.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, values=(soft, hard): values)
        with caplog.at_level(logging.WARNING):
            server_app._allow_open_files(4096)
        assert limits == ([] if expected is None else [(expected, hard)])
    assert caplog.text.count("--max-connections 4096") == 1
