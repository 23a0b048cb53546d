"""Parsing of requests: what is refused, what is dropped, and that no body is read as a request."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.http.answers import PROTECTIVE_HEADERS
from tests.api.http.driving import Outcome, drive

POST = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: smuggled\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def head(*lines: bytes, first: bytes = POST) -> bytes:
    return first + b"".join(line + b"\r\n" for line in lines)


REFUSED: dict[str, tuple[bytes, int, str]] = {
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_request"),
    "two Hosts": (head(b"Host: localhost", first=GET) + b"\r\n", 400, "invalid_request"),
    **{
        f"Host {host!r}": (b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", 400, "invalid_request")
        for host in (
            b"a b",
            b"a/b",
            b"a?b",
            b"a@b",
            b"http://a",
            b"a:b",
            b"a:1:2",
            b"[::1",
            b"::1",
            b"a\xff",
            b"a\tb",
        )
    },
    "user name": (b"GET http://a@localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "invalid_request"),
    "HTTP/0.9": (b"GET /\r\n\r\n", 505, "http_version_not_supported"),
    **{
        f"HTTP/{version}": (f"GET / HTTP/{version}\r\nHost: a\r\n\r\n".encode(), 505, "http_version_not_supported")
        for version in ("0.9", "1.2", "2.0", "3.0")
    },
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported"),
    "odd version": (b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400, "invalid_request"),
    **{
        f"coding {coding!r}": (
            head(b"Transfer-Encoding: " + coding) + b"\r\n" + LAST,
            501,
            "unsupported_transfer_coding",
        )
        for coding in (
            b"gzip, chunked",
            b"identity",
            b"xchunked",
            b"gzip",
            b'"chunked"',
            b"chunked;q=1",
            b"identity, chunked",
        )
    },
    **{
        f"coding {coding!r}": (head(b"Transfer-Encoding: " + coding) + b"\r\n" + LAST, 400, "invalid_request")
        for coding in (b"", b"\x0bchunked", b"chunked, gzip", b"chunked\r\nTransfer-Encoding: chunked")
    },
    "coding in HTTP/1.0": (b"POST / HTTP/1.0\r\n" + CHUNKED + LAST, 400, "invalid_request"),
    "length and coding": (head(b"Content-Length: 5") + CHUNKED + LAST, 400, "invalid_request"),
    "coding and length": (
        head(b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"\r\n",
        400,
        "invalid_request",
    ),
    **{
        f"length {length!r}": (head(b"Content-Length: " + length) + b"\r\nabc", 400, "invalid_request")
        for length in (b"", b"3, 3", b"+3", b"-3", b"0x3", b"1 1", b"3\r\nContent-Length: 3", b"3.0", b"9" * 30)
    },
    **{
        f"line {line!r}": (head(line, first=GET) + b"\r\n", 400, "invalid_request")
        for line in (
            *(b"X : a", b"X", b": a", b"X\0: a", b"X: a\0b", b"X: a\x01b", b"X: a\x7fb", b"X\xff: a", b"X Y: a"),
            *(b"X: a\r\n b", b"Content-Length:\r\n 3", b"X: a\nY: b", b"X: a\rY: b", b" X: a"),
        )
    },
    "fold after the first line": (b"GET / HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n", 400, "invalid_request"),
    "line feeds alone": (b"GET / HTTP/1.1\nHost: a\n\n", 400, "invalid_request"),
    "method": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
    "tunnel": (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "invalid_request"),
    "tunnel to a path": (b"CONNECT /v1/x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "invalid_request"),
    "target": (b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
    **{
        f"chunk {chunk!r}": (head() + CHUNKED + chunk + LAST, 400, "invalid_request")
        for chunk in (
            *(b"3\nabc\r\n", b"3\r\nabc\n", b"3\r\nabc", b"0x3\r\nabc\r\n", b"3 \r\nabc\r\n", b" 3\r\nabc\r\n"),
            *(b"-3\r\nabc\r\n", b"\r\n", b"f" * 20 + b"\r\nabc\r\n", b"3;a\nabc\r\n", b"3;a\rb\r\nabc\r\n"),
            *(b'3;a="x\r\ny"\r\nabc\r\n', b"3;a\0\r\nabc\r\n"),
        )
    },
    **{
        f"trailer {line!r}": (head() + CHUNKED + b"0\r\n" + line + b"\r\n\r\n", 400, "invalid_request")
        for line in (b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X : a", b"X: a\nY: b", b"X: a\r\n b")
    },
}


def answer_of(outcome: Outcome) -> tuple[bytes, Any]:
    """The head and the error of the only answer."""
    before, _, body = outcome.answers.partition(b"\r\n\r\n")
    return before, json.loads(body)["error"]


@pytest.mark.parametrize(("sent", "status", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_requests_are_refused(sent: bytes, status: int, code: str) -> None:
    for pieces in ([sent + SMUGGLED], [bytes([byte]) for byte in sent + SMUGGLED]):
        outcome = drive(pieces)
        assert outcome.statuses == [status]
        assert outcome.closed
        assert [call for call in outcome.calls if call.body is not None] == []
        before, error = answer_of(outcome)
        assert (error["code"], error["type"], error["param"]) == (code, "invalid_request_error", None)
        assert b"\r\nconnection: close" in before
        assert b"\r\nx-request-id: " in before
        for name, value in PROTECTIVE_HEADERS:
            assert f"\r\n{name}: {value}".encode() in before
        (refusal,) = outcome.refusals
        assert (refusal.code, refusal.status, refusal.reason) == (code, status, error["message"])


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /v1/x HTTP/1.0\r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\nhOST: \t my_box.example:80 \r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\nHost: [fe80::1%25eth0]:8000\r\n\r\n",
        b"\r\n" + GET + b"\r\n",
        head(b"Transfer-Encoding: CHUNKED ") + b"\r\n" + LAST,
        head(b"Content-Length: 0"),
        head(b"X: \xe4"),
    ],
)
def test_unusual_but_valid_requests_are_served(sent: bytes) -> None:
    outcome = drive([sent if sent.endswith(b"\r\n\r\n") else sent + b"\r\n"])
    assert outcome.statuses == [200]
    assert [call.path for call in outcome.calls] == ["/v1/x"]


def test_an_absolute_target_gives_the_host() -> None:
    for target, host in (
        (b"http://evil.example:80/v1/x", b"evil.example:80"),
        (b"http://evil.example/v1/x?a", b"evil.example"),
        (b"http://[::1]:9/v1/x", b"[::1]:9"),
    ):
        (call,) = drive([b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"]).calls
        assert call.path == "/v1/x"
        assert call.values(b"host") == [host]


def test_trailers_are_not_headers() -> None:
    trailers = (
        b"Authorization: Bearer k\r\nX-Request-ID: late\r\nHost: evil.example\r\nSec-Fetch-Site: same-origin\r\n"
    )
    sent = head(b"X-Request-ID: early") + CHUNKED + b"3\r\nabc\r\n0\r\n" + trailers + b"\r\n" + GET + b"\r\n"
    for pieces in ([sent], [bytes([byte]) for byte in sent]):
        outcome = drive(pieces)
        first, second = outcome.calls
        assert first.body == b"abc"
        assert first.values(b"x-request-id") == [b"early"]
        assert first.values(b"host") == [b"localhost"]
        assert not first.values(b"authorization")
        assert not first.values(b"sec-fetch-site")
        assert b"late" not in outcome.answers
        assert second.path == "/v1/x"


def test_connection_close_in_a_trailer_closes_the_connection() -> None:
    outcome = drive([head() + CHUNKED + b"0\r\nConnection: close\r\n\r\n", GET + b"\r\n"])
    assert outcome.statuses == [200]
    assert outcome.closed


@pytest.mark.parametrize(
    "endless",
    [
        *(
            b"0\r\n" + b"X" * 10_000,
            b"0\r\nX: " + b"y" * 10_000,
            b"0\r\n" + b"X: y\r\n" * 2000,
            b"3;" + b"x" * 10_000,
        ),
        b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n" * 400,
    ],
    ids=["name", "value", "lines", "extension", "extensions"],
)
def test_chunk_extensions_and_trailers_are_limited(endless: bytes) -> None:
    pieces = [endless[start : start + 500] for start in range(0, len(endless), 500)]
    outcome = drive([head() + CHUNKED, *pieces])
    assert outcome.closed
    assert outcome.statuses in ([400], [431])
    assert outcome.calls == []


def test_a_body_may_arrive_in_one_byte_chunks() -> None:
    pieces = [b"1\r\nx\r\n"] * 5000
    (call,) = drive([head() + CHUNKED, *pieces, LAST]).calls
    assert call.body == b"x" * 5000


UPGRADES = {
    "h2c of curl": (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    ),
    "websocket": (b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
    "several": (b"Connection: upgrade", b"Upgrade: TLS/1.0, h2c, websocket"),
}


@pytest.mark.parametrize("lines", UPGRADES.values(), ids=UPGRADES.keys())
@pytest.mark.parametrize("framing", ["none", "length", "empty", "chunked"])
def test_protocol_upgrades_are_ignored(lines: tuple[bytes, ...], framing: str) -> None:
    body = b"" if framing in ("none", "empty") else SMUGGLED
    sent = head(*lines, first=GET if framing == "none" else POST)
    if framing == "chunked":
        sent += CHUNKED + b"%x;a=b\r\n" % len(body) + body + b"\r\n0\r\nX-Request-ID: late\r\n\r\n"
    else:
        sent += (b"" if framing == "none" else b"Content-Length: %d\r\n" % len(body)) + b"\r\n" + body
    for pieces in ([sent * 3], [sent] * 3, [bytes([byte]) for byte in sent * 3]):
        outcome = drive(pieces)
        assert outcome.statuses == [200] * 3
        assert [(call.path, call.body) for call in outcome.calls] == [("/v1/x", body)] * 3
        assert not outcome.closed
    last = drive([sent.replace(lines[0], lines[0] + b", close"), SMUGGLED])
    assert last.statuses == [200]
    assert last.closed


def test_expect_100_is_answered_before_the_body_and_an_early_answer_closes_the_connection() -> None:
    waiting = head(b"Content-Length: 3", b"Expect: 100-Continue") + b"\r\n"
    outcome = drive([waiting, b"abc", GET + b"\r\n"])
    assert outcome.statuses == [100, 200, 200]
    assert outcome.calls[0].body == b"abc"
    early = drive([waiting.replace(b"/v1/x", b"/early"), SMUGGLED])
    assert early.statuses == [200]
    assert early.closed
    assert b"connection: close" in early.answers
    old = drive([b"POST /v1/x HTTP/1.0\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"])
    assert old.statuses == [200]


def test_an_allowed_origin_may_read_the_refusal() -> None:
    sent = head(b"Origin: http://page.example", b"Transfer-Encoding: gzip, chunked") + b"\r\n"
    before, _ = answer_of(drive([sent], origins=["http://page.example"]))
    assert b"\r\naccess-control-allow-origin: http://page.example\r\n" in before
    assert b"\r\nvary: Origin" in before
    before, _ = answer_of(drive([sent], origins=["http://other.example"]))
    assert b"access-control-allow-origin" not in before
    assert b"\r\nvary: Origin" in before
    before, _ = answer_of(drive([sent]))
    assert b"vary" not in before


# Pipelines

Request = tuple[bytes, str, bytes | None, bool]
"""Bytes, id, the body that the application reads, and whether the connection closes after it."""


@st.composite
def requests(draw: st.DrawFn, number: int) -> Request:
    body = draw(st.sampled_from([b"", b"abc", SMUGGLED, b"\r\n" + SMUGGLED * 2, LAST + SMUGGLED]))
    is_early, expects = draw(st.booleans()), draw(st.booleans())
    lines = [b"X-Request-ID: r%d" % number]
    lines += draw(st.sampled_from([(), *UPGRADES.values()]))
    lines += [b"Expect: 100-continue"] if expects else []
    framing = draw(st.sampled_from(["length", "chunked"]))
    first = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % (b"/early" if is_early else b"/v1/x")
    if framing == "length":
        sent = head(*draw(st.permutations([*lines, b"Content-Length: %d" % len(body)])), first=first) + b"\r\n" + body
    else:
        sent = head(*draw(st.permutations([*lines, b"Transfer-Encoding: chunked"])), first=first) + b"\r\n"
        cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=3)))
        for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
            if end > start:
                extension = draw(st.sampled_from([b"", b";a", b';a="GET / HTTP/1.1"']))
                sent += b"%x%s\r\n" % (end - start, extension) + body[start:end] + b"\r\n"
        trailers = draw(st.sampled_from([b"", b"X-Request-ID: late\r\n", b"Authorization: Bearer k\r\nHost: b\r\n"]))
        sent += b"0\r\n" + trailers + b"\r\n"
    return sent, f"r{number}", None if is_early else body, is_early and expects


def cut(data: bytes, places: list[int]) -> list[bytes]:
    cuts = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if end > start]


@pytest.mark.slow
@given(data=st.data(), places=st.lists(st.integers(0, 5000), max_size=12), num=st.integers(1, 5))
def test_no_body_is_ever_read_as_a_request(data: st.DataObject, places: list[int], num: int) -> None:
    sequence = [data.draw(requests(number)) for number in range(num)]
    bad = data.draw(st.sampled_from([None, *(sent for sent, _, _ in REFUSED.values())]))
    sent = b"".join(request[0] for request in sequence) + (b"" if bad is None else bad + SMUGGLED)
    outcome = drive(cut(sent, places))
    assert b"smuggled" not in outcome.answers
    assert b"late" not in outcome.answers
    expected = []
    for _, name, body, ends in sequence:
        expected.append((name.encode(), body))
        if ends:
            break
    seen = [(call.values(b"x-request-id")[0], call.body) for call in outcome.calls if call.values(b"x-request-id")]
    final = [status for status in outcome.statuses if status != 100]
    if bad is None:
        assert seen == expected
        assert final == [200] * len(expected)
        assert outcome.closed == sequence[len(expected) - 1][3]
    else:
        # Requests queued after a bad one are dropped with it: no request gets another's answer.
        assert seen == expected[: len(seen)]
        assert final[:-1] == [200] * (len(final) - 1)
        assert final.count(200) <= len(seen)
        assert all(status in {200, 400, 501, 505} for status in final)
        assert outcome.closed
    for call in outcome.calls:
        assert not call.values(b"authorization")
        assert call.values(b"host") == [b"localhost"]


WIRE = b"".join(sent for sent, _, _ in REFUSED.values()) + b"".join(b"".join(lines) for lines in UPGRADES.values())


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [POST, GET, b"\r\n", CHUNKED, LAST, SMUGGLED, b"Content-Length: 3\r\n", b"Upgrade: a\r\n"]
            ),
            st.sampled_from(
                [b"Connection: upgrade\r\n", b"Expect: 100-continue\r\n", b"3\r\nabc\r\n", b"abc", b"\0"]
            ),
            st.builds(lambda start, num: WIRE[start : start + num], st.integers(0, len(WIRE)), st.integers(1, 60)),
            st.binary(max_size=20),
        ),
        max_size=20,
    )
)
def test_any_bytes_lead_to_answers_or_a_closed_connection(pieces: list[bytes]) -> None:
    """The parsed requests do not depend on how the bytes are split."""
    whole = drive([b"".join(pieces)])
    parts = drive(pieces)
    for outcome in (whole, parts):
        assert len([status for status in outcome.statuses if status == 200]) <= len(outcome.calls)
        assert not any(status >= 400 for status in outcome.statuses[:-1])
        assert not outcome.refusals or outcome.closed
    if not (whole.closed or parts.closed):
        assert [(call.path, call.body) for call in whole.calls] == [(call.path, call.body) for call in parts.calls]


def test_every_answer_of_a_real_server_has_the_security_headers(serve: Any) -> None:
    live = serve(max_body_bytes=1000, max_head_bytes=2048)
    large = b"x" * 2000
    for response in (
        httpx.get(f"{live.url}/live"),
        httpx.get(f"{live.url}/docs"),
        httpx.get(f"{live.url}/metrics"),
        httpx.get(f"{live.url}/no-such"),
        httpx.get(f"{live.url}/live", headers={"host": "evil.example"}),
        httpx.post(f"{live.url}/v1/completions", headers={"origin": "null"}),
        httpx.post(f"{live.url}/v1/completions", content=large, headers={"content-type": "application/json"}),
        httpx.post(f"{live.url}/v1/completions", json={"prompt": "abc", "stream": True}),
        httpx.get(f"{live.url}/" + "a" * 3000),
        httpx.get(f"{live.url}/live", headers={f"x-{number}": "y" for number in range(200)}),
    ):
        for name, value in PROTECTIVE_HEADERS:
            assert response.headers.get_list(name) == [value], response
        assert response.headers["x-request-id"]
        assert len(response.headers.get_list("date")) == 1
    assert httpx.get(f"{live.url}/docs").headers["location"] == "/console#/api"
