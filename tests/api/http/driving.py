"""The server's protocol without a socket: bytes in, bytes out, and the requests that reach the application."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from server.api.http.answers import PROTECTIVE_HEADERS, ExpectMiddleware
from server.api.http.connections import ConnectionLimits, limited
from server.api.http.origins import Origins
from server.api.http.refusal_log import Refusal


class Transport(asyncio.Transport):
    """Stores the written bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def fileno(self) -> int:
        return -1

    def getpeername(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getsockname = getpeername
    family = -1

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        if not self.closed:
            self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request as the application saw it."""

    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes | None

    def values(self, name: bytes) -> list[bytes]:
        return [value for known, value in self.headers if known == name]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one connection's bytes."""

    calls: list[Call]
    answers: bytes
    closed: bool
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.answers)]


def drive(pieces: Iterable[bytes], *, origins: Sequence[str] = (), **limits: int) -> Outcome:
    """Feed a connection; ``/early`` is answered before its body is read, everything else afterwards."""
    return asyncio.run(_drive(pieces, origins, limits))


async def _drive(pieces: Iterable[bytes], origins: Sequence[str], limits: dict[str, int]) -> Outcome:
    calls: list[Call] = []
    refusals: list[Refusal] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = None
        if scope["path"] != "/early":
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                more = message.get("more_body", False)
        headers = list(scope["headers"])  # read again after the body has arrived
        calls.append(Call(method=scope["method"], path=scope["path"], headers=headers, body=body))
        answered = [(b"content-length", b"0"), (b"x-request-id", dict(headers).get(b"x-request-id", b"-"))]
        await send({"type": "http.response.start", "status": 200, "headers": answered})
        await send({"type": "http.response.body", "body": b""})

    held = {"max_connections": 10, "max_head_bytes": 4096, "head_seconds": 600, "stall_seconds": 600} | limits
    protocol_class = limited(ConnectionLimits(**held, on_refused=refusals.append, origins=Origins(origins)))
    config = Config(ExpectMiddleware(app), http=protocol_class, lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    state.default_headers = [(name.encode(), value.encode()) for name, value in PROTECTIVE_HEADERS]
    protocol, transport = protocol_class(config, state, {}), Transport()
    protocol.connection_made(transport)

    async def settle() -> None:
        for _ in range(200):
            await asyncio.sleep(0)
            if not state.tasks and not protocol.pipeline:
                return

    for piece in pieces:
        if transport.closed:
            break
        protocol.data_received(piece)
        await asyncio.sleep(0)
    for _ in range(3):
        await settle()
    closed = transport.closed
    protocol.connection_lost(None)
    await settle()
    return Outcome(calls=calls, answers=transport.written, closed=closed, refusals=refusals)
