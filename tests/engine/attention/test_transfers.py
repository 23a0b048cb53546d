"""Copies to the host are queued, and awaited alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.engine.attention import transfers
from server.engine.attention.transfers import queue_to_host


def test_a_tensor_on_the_host_is_returned_itself() -> None:
    tensor = torch.arange(3)
    assert queue_to_host(tensor)() is tensor


class Event:
    """A fake of ``torch.cuda.Event``."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def record(self) -> None:
        self._done.append("recorded")

    def synchronize(self) -> None:
        self._done.append("waited")


@pytest.mark.parametrize("tensor", [torch.arange(6).view(2, 3), torch.tensor([1.5]), torch.tensor([[True], [False]])])
def test_a_copy_from_a_device_is_awaited_when_it_is_read(
    tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a fake of a device, whose memory is the host's."""
    done: list[str] = []
    empty = torch.empty

    def pinned(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*shape, **options)

    monkeypatch.setattr(transfers, "pins", lambda _device: True)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(done))
    want = tensor.clone()
    copy = queue_to_host(tensor)
    assert done == ["recorded"]
    tensor.zero_()  # the device goes on with its memory
    assert copy().tolist() == want.tolist()
    assert copy().dtype is want.dtype
    assert done == ["recorded", "waited", "waited"]
