"""What answers, and connections."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from server.bulk.connecting import Answerer, Connections, find_answerer
from server.client import ClientError


class Client:
    """A client of a server that knows some names."""

    def __init__(self, version: dict[str, Any] | ClientError, model: ClientError | None = None) -> None:
        self._version = version
        self._model = model

    def version(self, _: object) -> dict[str, Any]:
        if isinstance(self._version, ClientError):
            raise self._version
        return self._version

    def model(self, name: str) -> dict[str, Any]:
        if self._model is not None:
            raise self._model
        return {"id": name}


def failure(status: int | None) -> ClientError:
    return ClientError("it said no", status=status)


@pytest.mark.parametrize(
    ("name", "client", "answerer"),
    [
        ("a", Client({"id": "a", "version": 3, "task_type": "CAUSAL_LM"}), ("a@3", False)),
        ("a@x", Client({"id": "a", "version": 3, "task_type": "SEQ_CLS"}), ("a@3", True)),
        ("a", Client(failure(404)), ("a", False)),  # the base model is called so
        ("Org/Base", Client(failure(500)), ("Org/Base", False)),
        ("base:a@2", Client(failure(500)), ("base:a@2", False)),
        ("a@x", Client(failure(403), failure(403)), ("a@x", False)),  # a key for nothing but generation
    ],
)
def test_what_answers(name, client, answerer):
    found = find_answerer(client, name)
    assert (found.model, found.has_head) == answerer
    assert found == Answerer(*answerer, found.record)


@pytest.mark.parametrize("client", [Client(failure(404), failure(404)), Client(failure(None)), Client(failure(500))])
def test_nothing_answers(client):
    with pytest.raises(ClientError, match="it said no"):
        find_answerer(client, "a")


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:port"])
def test_a_url_that_is_none(url):
    with pytest.raises(ClientError) as refused:
        Connections(url, None, requests=1, timeout=1.0)
    assert refused.value.code == "unreachable"


def test_a_key_that_no_header_can_carry():
    with pytest.raises(ClientError, match="no header can carry"):
        Connections("http://127.0.0.1", "é", requests=1, timeout=1.0)


@pytest.mark.anyio
async def test_many_requests_at_once_are_spread_over_clients_and_none_is_lost() -> None:
    most = now = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, now
        with suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(2)
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.02)
                now -= 1
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" + body)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Connections(url, "key", requests=100, timeout=10.0) as http:
        replies = await asyncio.gather(*(http.post("/", content=b"%02d" % i, headers={}) for i in range(100)))
        assert [reply.content for reply in replies] == [b"%02d" % i for i in range(100)]
        assert replies[0].request.headers["authorization"] == "Bearer key"
    assert most > 16
