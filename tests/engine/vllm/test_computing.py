"""One computation for all requests that wait for a soft prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from server.engine.types import SoftPromptSource
from server.engine.vllm import computing
from server.engine.vllm.computing import Computations
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def rows(name: str) -> SoftPromptSource:
    return SoftPromptSource(digest=name, num_virtual_tokens=3, is_key_values=False, path=f"/{name}")


class Computer:
    """Computes when its gate opens, and counts."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.computations = Computations(self.compute)

    async def compute(self, source: SoftPromptSource, lora: object) -> None:
        del lora
        self.computed.append(source.digest)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(source.digest)
            raise
        if self.error is not None:
            raise self.error

    def start(self, name: str) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.computations.ensure(rows(name)))


async def test_64_requests_cause_one_computation() -> None:
    computer = Computer()
    tasks = [computer.start("a") for _ in range(64)]
    await until(lambda: computer.computed)
    computer.gate.set()
    await asyncio.gather(*tasks)
    await computer.start("a")
    assert computer.computed == ["a"]
    computer.computations.forget("a")
    await computer.start("a")
    assert computer.computed == ["a", "a"]


async def test_an_error_reaches_all_that_wait_and_the_next_one_tries_again() -> None:
    computer = Computer()
    computer.error = ValueError("unreadable")
    tasks = [computer.start("a") for _ in range(3)]
    await until(lambda: computer.computed)
    computer.gate.set()
    assert [str(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == ["unreadable"] * 3
    computer.error = None
    await computer.start("a")
    assert computer.computed == ["a", "a"]


async def test_a_computation_ends_with_the_last_request_that_waits() -> None:
    computer = Computer()
    first, second = computer.start("a"), computer.start("a")
    await until(lambda: computer.computed)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert computer.cancelled == []
    second.cancel()
    await until(lambda: computer.cancelled)
    computer.gate.set()
    await computer.start("a")
    assert computer.computed == ["a", "a"]


async def test_a_request_that_arrives_while_a_computation_is_being_cancelled_gets_its_own() -> None:
    computer = Computer()
    first = computer.start("a")
    await until(lambda: computer.computed)
    first.cancel()
    second = computer.start("a")
    await asyncio.gather(first, return_exceptions=True)
    computer.gate.set()
    await second
    assert len(computer.computed) <= 2


async def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "MAX_KNOWN", 2)
    computer = Computer()
    computer.gate.set()
    ensure: Callable[[str], Awaitable[None]] = computer.start
    for name in ("a", "b", "a", "c", "a"):
        await ensure(name)
    assert computer.computed == ["a", "b", "c"]
    await ensure("b")
    assert computer.computed == ["a", "b", "c", "b"]
