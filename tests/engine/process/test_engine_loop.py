"""What the step loop sends, and when: beside the next step if the device overlaps the host."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.engine.messages import AbortRequest, Shutdown, StepOutputs
from server.engine.process.engine_process import EngineLoop
from server.engine.stats import EngineStats
from server.engine.types import GenerateRequest, SamplingParams, TokenEvent
from server.errors import DeviceError


class FakeEngine:
    """Says the number of each step; a request is a step.

    Args:
        diary: Receives what the engine does.
        overlaps_host: As of ``LLMEngine``.
        fails_at: The step that raises; None for none.
        cannot_queue: The step that cannot be queued, so that ``meanwhile`` is not called; None for none.
    """

    def __init__(
        self, diary: list[str], *, overlaps_host: bool, fails_at: int | None = None, cannot_queue: int | None = None
    ) -> None:
        self.overlaps_host = overlaps_host
        self.idle_seconds: float | None = None
        self.is_loading = False
        self.num_waiting = self.num_steps = 0
        self._diary, self._fails_at, self._cannot_queue = diary, fails_at, cannot_queue

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(steps=self.num_steps)

    def add(self, _request: GenerateRequest) -> list[TokenEvent]:
        self.num_waiting += 1
        return []

    def abort(self, request_id: str) -> list[TokenEvent]:
        self.num_waiting -= 1
        return [TokenEvent(request_id=request_id)]

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[TokenEvent]:
        number = self.num_steps + 1
        if number == self._fails_at:
            raise DeviceError("the device failed")
        self._diary.append(f"launch {number}")
        if number != self._cannot_queue:
            meanwhile()
        self._diary.append(f"wait {number}")
        self.num_steps = number
        self.num_waiting -= 1
        return [TokenEvent(request_id=f"step {number}")]


@pytest.fixture
def loop() -> Iterator[EngineLoop]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield EngineLoop(theirs)


def request(name: str) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams(max_tokens=1))


def diary_of(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, num_requests: int, **engine: Any) -> list[str]:
    """What a loop does with requests that arrive at once; after the last step it is shut down."""
    diary: list[str] = []

    def send(message: StepOutputs) -> None:
        ids = ", ".join(event.request_id for event in message.events)
        diary.append(f"send [{ids}] {message.num_received} {'more' if message.has_work else 'idle'}")
        if not message.has_work:
            loop._inbox.put(Shutdown())

    monkeypatch.setattr(loop, "_send", send)
    for index in range(num_requests):
        loop._inbox.put(request(str(index)))
    loop._loop(FakeEngine(diary, **engine))  # type: ignore[arg-type]
    return diary


def test_events_are_sent_after_their_step_if_nothing_overlaps(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert diary_of(loop, monkeypatch, 2, overlaps_host=False) == [
        "launch 1",
        "wait 1",
        "send [step 1] 2 more",
        "launch 2",
        "wait 2",
        "send [step 2] 2 idle",
    ]


def test_events_are_sent_while_the_next_step_is_computed(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diary_of(loop, monkeypatch, 3, overlaps_host=True) == [
        "launch 1",
        "send [] 3 more",
        "wait 1",
        "launch 2",
        "send [step 1] 3 more",
        "wait 2",
        "launch 3",
        "send [step 2] 3 more",
        "wait 3",
        "send [step 3] 3 idle",
    ]


def test_events_before_a_step_that_cannot_be_queued_are_sent_with_its_own(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert diary_of(loop, monkeypatch, 2, overlaps_host=True, cannot_queue=2)[-3:] == [
        "launch 2",
        "wait 2",
        "send [step 1, step 2] 2 idle",
    ]


def test_an_abort_is_handled_between_two_steps(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop._inbox.put(request("first"))
    loop._inbox.put(AbortRequest(request_id="gone"))
    assert diary_of(loop, monkeypatch, 2, overlaps_host=True) == [
        "launch 1",
        "send [gone] 4 more",
        "wait 1",
        "launch 2",
        "send [step 1] 4 more",
        "wait 2",
        "send [step 2] 4 idle",
    ]


@pytest.mark.parametrize("overlaps_host", [False, True])
def test_events_are_sent_before_the_loop_ends_with_an_error(
    overlaps_host: bool, loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary: list[str] = []
    monkeypatch.setattr(loop, "_send", lambda message: diary.extend(event.request_id for event in message.events))
    for index in range(3):
        loop._inbox.put(request(str(index)))
    engine: Any = FakeEngine([], overlaps_host=overlaps_host, fails_at=3)
    with pytest.raises(DeviceError):
        loop._loop(engine)
    assert diary == ["step 1", "step 2"]
