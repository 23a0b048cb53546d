"""Requests over reused connections: every answer belongs to its request, even if connections break."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.client.bulk.transport import NoResponseError, Response, open_transport
from server.client.http import ClientError
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """The default event loop and the command's, uvloop."""
    return "asyncio", {"use_uvloop": request.param}


Answer = Callable[[bytes, bytes, asyncio.StreamWriter], Awaitable[None]]


def reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


class Server:
    """Passes each request's head and body to ``answer``, which writes the response.

    Attributes:
        heads: Heads of all requests.
        num_connections: Number of accepted connections.
        num_lost: Number of connections that the client closed.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.heads: list[bytes] = []
        self.num_connections = self.num_lost = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with closing(writer), suppress(ConnectionError):
            while not writer.is_closing():
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError:
                    self.num_lost += 1
                    break
                size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                body = await reader.readexactly(int(size.split(b":")[1]))
                self.heads.append(head)
                await self._answer(head, body, writer)

    @asynccontextmanager
    async def running(self, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0, ssl=context)
        async with server:
            yield f"{'https' if context else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def echo(_: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.005)
    writer.write(reply(body, "X-Prelude-Prompt: a@1"))


async def test_one_connection_per_concurrent_request_is_reused() -> None:
    server = Server(echo)
    async with server.running() as url, open_transport(f"{url}/under/", "key") as http:
        assert http.base_url == f"{url}/under"
        for _ in range(3):
            replies = await asyncio.gather(*(http.post("/v1/x", b"%02d" % i) for i in range(50)))
            assert replies == [Response(200, replies[i].headers, b"%02d" % i) for i in range(50)]
    assert replies[0].headers["x-prelude-prompt"] == "a@1"
    assert server.num_connections == 50
    head = server.heads[0]
    assert head.startswith(b"POST /under/v1/x HTTP/1.1\r\n")
    for line in (b"\r\nauthorization: bearer key\r\n", b"\r\ncontent-type: application/json\r\n"):
        assert line in head.lower()
    assert f"\r\nhost: {url.removeprefix('http://')}\r\n".encode() in head.lower()


@settings(max_examples=40, deadline=None)
@given(body=st.binary(max_size=200), cuts=st.lists(st.integers(1, 400), max_size=8), is_chunked=st.booleans())
def test_an_answer_is_the_same_in_any_pieces(body: bytes, cuts: list[int], is_chunked: bool) -> None:
    if is_chunked:
        pieces = [body[start : start + 7] for start in range(0, len(body), 7)] + [b""]
        whole = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        whole += b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    else:
        whole = reply(body)

    async def answer(_: bytes, __: bytes, writer: asyncio.StreamWriter) -> None:
        ends = sorted({*cuts, len(whole)})
        for start, end in zip([0, *ends], ends, strict=False):
            writer.write(whole[start:end])
            await writer.drain()
            await asyncio.sleep(0)

    async def ask() -> None:
        async with Server(answer).running() as url, open_transport(url, None) as http:
            for _ in range(2):
                assert (await http.post("/", b"{}")).content == body

    asyncio.run(ask())


async def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    async def answer(_: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\n\r\n" + body)
        writer.close()

    async with Server(answer).running() as url, open_transport(url, None) as http:
        for _ in range(2):
            assert await http.post("/", b"{}") == Response(503, {"retry-after": "2"}, b"{}")


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_connection_that_the_server_closes_between_two_requests_is_replaced(says_so: bool) -> None:
    async def answer(_: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(body, *(["connection: close"] if says_so else [])))
        await writer.drain()
        writer.close()

    server = Server(answer)
    async with server.running() as url, open_transport(url, None) as http:
        for number in range(5):
            assert (await http.post("/", b"%d" % number)).content == b"%d" % number
    assert server.num_connections == 5
    assert len(server.heads) == 5


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", "not completed"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed the connection without a response"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection without a response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "Bad status line"),
    ],
)
async def test_an_incomplete_answer_is_an_error(sent: bytes, reason: str) -> None:
    async def answer(_: bytes, __: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with Server(answer).running() as url, open_transport(url, None) as http:
        with pytest.raises(NoResponseError, match=reason):
            await http.post("/", b"{}")


async def test_a_cancelled_request_closes_its_connection() -> None:
    async def answer(_: bytes, __: bytes, ___: asyncio.StreamWriter) -> None:
        return

    server = Server(answer)
    async with server.running() as url, open_transport(url, None) as http:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await http.post("/", b"{}")
        await until(lambda: server.num_lost == 1)


async def test_a_refused_connection_is_an_error() -> None:
    async with open_transport("http://127.0.0.1:1", None) as http:
        with pytest.raises(NoResponseError, match=r"refused|Connect call failed"):
            await http.post("/", b"{}")


async def test_tls_accepts_only_trusted_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with Server(echo).running(context) as url:
        async with open_transport(url, None) as http:
            with pytest.raises(NoResponseError, match="certificate verify failed"):
                await http.post("/", b"{}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with open_transport(url, None) as http:
            assert (await http.post("/", b"{}")).content == b"{}"


def make_certificate(folder: Path) -> Path:
    """One file with a key and a self-signed certificate for 127.0.0.1."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


async def test_a_user_and_password_in_the_url_are_sent() -> None:
    server = Server(echo)
    async with server.running() as url, open_transport(url.replace("//", "//name:word@"), None) as http:
        await http.post("/", b"{}")
    assert b"\r\nauthorization: basic bmftztp3b3jk\r\n" in server.heads[0].lower()


async def test_a_user_in_the_url_and_a_key_cannot_be_combined() -> None:
    with pytest.raises(ClientError, match="cannot be combined with an API key"):
        async with open_transport("http://name:word@host", "key"):
            pass


async def test_requests_use_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(echo)
    async with server.running() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with open_transport("http://prelude.example", "key") as http:
            assert (await http.post("/v1/x", b"{}")).content == b"{}"
    assert server.heads[0].startswith(b"POST http://prelude.example/v1/x HTTP/1.1")
    assert b"authorization: bearer key" in server.heads[0].lower()


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:port"])
async def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ClientError) as refused:
        async with open_transport(url, None):
            pass
    assert refused.value.code == "usage"


@pytest.mark.parametrize("key", ["é", "a\r\nx: y", "a\0"])
async def test_a_key_that_is_not_a_valid_header_is_refused(key: str) -> None:
    with pytest.raises(ClientError, match="is not allowed in a header"):
        async with open_transport("http://127.0.0.1", key):
            pass
