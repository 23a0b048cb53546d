"""What answers, and connections."""

from __future__ import annotations

from typing import Any

import pytest

from server.bulk.connecting import Answerer, connect, find_answerer
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
        connect(url, None, connections=1, timeout=1.0)
    assert refused.value.code == "unreachable"


def test_a_key_that_no_header_can_carry():
    with pytest.raises(ClientError, match="no header can carry"):
        connect("http://127.0.0.1", "é", connections=1, timeout=1.0)
