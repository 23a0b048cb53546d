"""Client commands report an answer that is not from a Prelude server."""

from __future__ import annotations

import re

import httpx
import pytest

from server.client import commands
from server.client.http import ClientError, PreludeClient

OTHER_BODIES = ["<html>", "[]", '{"error": "x"}', '{"error": {"message": 1}}']
OTHER_STATUSES = [(301, 1), (403, 6), (404, 3), (500, 1), (502, 7), (503, 7), (504, 7)]


@pytest.mark.parametrize(
    ("status", "exit_status", "body"),
    [
        *((200, 1, body) for body in OTHER_BODIES[:2]),  # an object with status 200 is what a Prelude server answers
        *((*status, body) for status in OTHER_STATUSES for body in OTHER_BODIES),
    ],
)
def test_other_servers_are_recognised(
    monkeypatch: pytest.MonkeyPatch, status: int, exit_status: int, body: str
) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=body))
    client = PreludeClient("http://other")
    monkeypatch.setattr(client, "_http", httpx.Client(transport=transport))
    with client, pytest.raises(ClientError, match="is this a Prelude server") as refused:
        client.prompt("x")
    assert commands.status_of(refused.value) == exit_status


def test_redirects_and_bad_gateways_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, headers, words in (
        (301, {"location": "https://other/v1/prompts/x"}, "It redirects to 'https://other/v1/prompts/x'"),
        (502, {}, "A proxy in front of it cannot reach it"),
    ):
        answer = httpx.Response(status, headers=headers, text="<html>")
        client = PreludeClient("http://other")
        transport = httpx.MockTransport(lambda _, answer=answer: answer)
        monkeypatch.setattr(client, "_http", httpx.Client(transport=transport))
        with client, pytest.raises(ClientError, match=re.escape(words)):
            client.prompt("x")
