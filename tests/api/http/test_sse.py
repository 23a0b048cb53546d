"""Event streams with long waits, stalled readers and many disconnects."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from server.api.errors import ErrorReply, describe
from server.api.http import sse
from server.api.http.sse import KEEP_ALIVE, EventStream

pytestmark = pytest.mark.anyio

SCOPE = {"type": "http"}


def described(error: Exception) -> ErrorReply:
    return describe(error, request_id="r")


class Client:
    """The client's end of an ASGI connection, which stops reading at some point.

    Attributes:
        sent: Messages from the server.
        ended: Whether the events were closed.
        num_taken: Events that were taken from the engine.
    """

    def __init__(self, *, reads: int = 10**9) -> None:
        self.sent: list[Any] = []
        self.ended = False
        self.num_taken = 0
        self._reads = reads

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError("the client never disconnects")

    async def send(self, message: Any) -> None:
        if len(self.sent) >= self._reads:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def events(self, *waits: float) -> AsyncGenerator[bytes, None]:
        try:
            for seconds in waits:
                await asyncio.sleep(seconds)
                self.num_taken += 1
                yield b"data: x\n\n"
        finally:
            self.ended = True

    async def stream(self, events: AsyncGenerator[bytes, None]) -> None:
        response = EventStream(events, late_headers=lambda: {"x-late": "1"}, on_error=described, stall_seconds=0.3)
        await response(SCOPE, self.receive, self.send)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.1)


@pytest.mark.usefixtures("quick")
async def test_silences_are_broken_by_comments() -> None:
    client = Client()
    await client.stream(client.events(0.35, 0, 0.25))
    assert client.sent[0]["type"] == "http.response.start"
    assert (b"x-late", b"1") in client.sent[0]["headers"]
    assert client.bodies[0] == KEEP_ALIVE
    assert [body for body in client.bodies if body != KEEP_ALIVE] == [b"data: x\n\n"] * 3 + [b""]
    first, last = [index for index, body in enumerate(client.bodies) if body != KEEP_ALIVE][1:3]
    assert last - first > 1, "the second silence was not broken"
    assert client.sent[-1]["more_body"] is False


async def test_a_quick_stream_has_no_comments() -> None:
    client = Client()
    await client.stream(client.events(0, 0.01, 0))
    assert client.bodies == [b"data: x\n\n"] * 3 + [b""]


@pytest.mark.usefixtures("quick")
async def test_an_error_after_a_comment_is_an_event() -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.25)
        for event in list[bytes]():
            yield event
        raise ValueError("too late")

    client = Client()
    await client.stream(failing())
    assert client.bodies[0] == KEEP_ALIVE
    assert b'"internal_error"' in client.bodies[-2]


async def test_an_error_before_the_first_event_is_raised() -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        for event in list[bytes]():
            yield event
        raise ValueError("early")

    client = Client()
    with pytest.raises(ValueError, match="early"):
        await client.stream(failing())
    assert client.sent == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("waits", [(0,) * 1000, (0, 0, 5)], ids=["blocked by an event", "blocked by a comment"])
async def test_no_events_are_taken_for_a_stalled_reader_and_its_stream_is_closed(waits: tuple[float, ...]) -> None:
    client = Client(reads=3)
    async with asyncio.timeout(3):
        await client.stream(client.events(*waits))
    assert client.ended
    assert client.num_taken <= 3
    assert len(client.sent) == 3


@pytest.mark.slow
def test_two_hundred_random_disconnects_release_everything(
    serve: Callable[..., Any], engine: Any, store: Any, eventually: Callable[..., None], upload_parts: Any
) -> None:
    live = serve(max_waiting=500)
    engine.step_seconds, engine.reply = 0.02, "x" * 200
    httpx.post(f"{live.url}/v1/prompts", **upload_parts("sentiment")).raise_for_status()
    rng = random.Random(0)

    async def one(client: httpx.AsyncClient) -> None:
        path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/classify"])
        body: dict[str, Any] = {
            "model": "sentiment",
            "prompt": ["a", "b"],
            "messages": [{"role": "user", "content": "a"}],
        }
        body |= {"input": "a", "labels": ["x", "y"], "stream": rng.random() < 0.7, "ignore_eos": True}
        try:
            async with asyncio.timeout(rng.uniform(0, 2.5)):
                async with client.stream("POST", path, json=body | {"max_tokens": 190}) as response:
                    async for _ in response.aiter_raw():
                        pass
        except (TimeoutError, httpx.TransportError):
            pass

    async def crowd() -> None:
        async with httpx.AsyncClient(
            base_url=live.url, timeout=30, limits=httpx.Limits(max_connections=200)
        ) as client:
            await asyncio.gather(*(one(client) for _ in range(200)))

    asyncio.run(crowd())
    eventually(lambda: engine.in_flight == 0 and len(store.released) == len(store.leased))
    assert engine.requests
    assert {ending for _, ending in engine.ended} >= {"abort"}
    admission = live.server._services.admission
    eventually(lambda: admission.num_in_use == 0)
