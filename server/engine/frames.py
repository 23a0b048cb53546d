"""Frames on a stream socket: four bytes of length (big endian), and a body of that length."""

from __future__ import annotations

import socket

HEADER_BYTES = 4
MAX_BODY_BYTES = 256 * 1024 * 1024


def frame(body: bytes) -> bytes:
    """A body with its length before it.

    Raises:
        ValueError: If it is longer than a frame may be.
    """
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"a message of {len(body)} bytes exceeds the limit of {MAX_BODY_BYTES}")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def receive(connection: socket.socket) -> bytes | None:
    """The body of the next frame; None if the other end has closed, or announces more than a frame may hold."""
    header = _receive_exactly(connection, HEADER_BYTES)
    length = int.from_bytes(header or b"", "big")
    return None if header is None or length > MAX_BODY_BYTES else _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    buffer = bytearray()
    while len(buffer) < length:
        try:
            part = connection.recv(min(length - len(buffer), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        buffer += part
    return bytes(buffer)
