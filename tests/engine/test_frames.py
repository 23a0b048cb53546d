from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import frames
from server.engine.frames import HEADER_BYTES, MAX_BODY_BYTES, frame, receive


@given(st.lists(st.binary(max_size=200)))
def test_bodies_arrive_as_they_were_sent_and_then_nothing(bodies: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"".join(map(frame, bodies)))
        assert [receive(theirs) for _ in bodies] == bodies
        assert receive(theirs) is None


def test_a_long_body_arrives_in_parts() -> None:
    body = bytes(range(256)) * 20_000
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=(frame(body),))
        sender.start()
        assert receive(theirs) == body
        sender.join()


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\5abc", (MAX_BODY_BYTES + 1).to_bytes(HEADER_BYTES, "big")])
def test_what_is_cut_off_or_too_long_is_no_frame(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(sent)
        assert receive(theirs) is None


def test_a_body_that_is_too_long_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_BODY_BYTES", 3)
    assert frame(b"abc") == b"\0\0\0\3abc"
    with pytest.raises(ValueError, match="a message of 4 bytes exceeds the limit of 3"):
        frame(b"abcd")
