"""Which adapters vLLM holds: never too many, none that is in use is evicted, and all get a turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from server.engine.stats import EngineStats
from server.engine.types import AdapterSource
from server.engine.vllm.adapters.residency import MAX_PASSED, Adapters
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def adapter(name: str) -> AdapterSource:
    return AdapterSource(digest=name, path=f"/{name}", config_path=f"/{name}.json", num_parameters=10)


class Holder:
    """What vLLM would hold; loads take a few turns of the event loop."""

    def __init__(self, capacity: int) -> None:
        self.held: dict[int, str] = {}
        self.loads: list[str] = []
        self.most = 0
        self.damaged: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.stats = EngineStats()
        self.adapters = Adapters(self.load, self.unload, capacity, 4, self.stats)
        self.in_use: list[int] = []

    async def load(self, source: AdapterSource, number: int) -> None:
        self.loads.append(source.digest)
        await self.gate.wait()
        self.held[number] = source.digest
        self.most = max(self.most, len(self.held))
        if source.digest in self.damaged:
            raise OSError(f"{source.digest} is damaged")

    async def unload(self, number: int) -> None:
        await asyncio.sleep(0)
        assert number not in self.in_use
        self.held.pop(number, None)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[None]:
        async with self.adapters.use(adapter(name)) as number:
            assert number is not None
            assert self.held[number] == name
            self.in_use.append(number)
            try:
                yield
            finally:
                self.in_use.remove(number)

    def start(self, name: str, until_done: asyncio.Event) -> asyncio.Task[None]:
        async def run() -> None:
            async with self.use(name):
                await until_done.wait()

        return asyncio.create_task(run())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_without_an_adapter_needs_none() -> None:
    holder = Holder(1)
    async with holder.adapters.use(None) as number:
        assert number is None
    assert holder.loads == []


async def test_requests_of_one_adapter_load_it_once_and_it_stays() -> None:
    holder, done = Holder(2), asyncio.Event()
    holder.gate.clear()
    tasks = [holder.start("a", done) for _ in range(8)]
    await settle()
    assert holder.in_use == []
    holder.gate.set()
    await until(lambda: len(holder.in_use) == 8)
    done.set()
    await asyncio.gather(*tasks)
    async with holder.use("a"):
        pass
    assert holder.loads == ["a"]
    assert holder.stats.adapters.hits == 8
    assert holder.stats.adapters.misses == 1
    assert holder.stats.adapters.resident_bytes == 40


async def test_the_least_recently_used_is_evicted_and_gets_a_new_number() -> None:
    holder = Holder(2)
    for name in ("a", "b", "a", "c"):
        async with holder.use(name):
            pass
    assert sorted(holder.held.values()) == ["a", "c"]
    async with holder.use("b"):
        pass
    assert sorted(holder.held.values()) == ["b", "c"]
    assert len(holder.held) == 2
    assert max(holder.held) == 4
    assert holder.stats.adapters.evictions == 2
    assert holder.stats.adapters.resident == 2


async def test_one_waits_until_another_is_unused() -> None:
    holder, first, second = Holder(1), asyncio.Event(), asyncio.Event()
    tasks = [holder.start("a", first), holder.start("b", second)]
    await settle()
    assert holder.loads == ["a"]
    first.set()
    await until(lambda: "b" in holder.loads)
    second.set()
    await asyncio.gather(*tasks)
    assert holder.most == 1


async def test_only_so_many_pass_one_that_waits() -> None:
    holder, done, last = Holder(1), asyncio.Event(), asyncio.Event()
    tasks = [holder.start("a", done)]
    await settle()
    tasks.append(holder.start("b", last))
    await settle()
    late = [holder.start("a", done) for _ in range(MAX_PASSED + 5)]
    await settle()
    assert len(holder.in_use) == 1 + MAX_PASSED
    holder.adapters.check_integrity()
    done.set()
    await until(lambda: "b" in holder.held.values())
    last.set()
    await asyncio.gather(*tasks, *late)
    assert holder.loads == ["a", "b", "a"]


async def test_one_that_leaves_blocks_nobody() -> None:
    holder, done = Holder(1), asyncio.Event()
    tasks = [holder.start("a", done)]
    await settle()
    waiting = holder.start("b", done)
    await settle()
    late = [holder.start("a", done) for _ in range(MAX_PASSED + 1)]
    await settle()
    assert len(holder.in_use) == 1 + MAX_PASSED
    waiting.cancel()
    await until(lambda: len(holder.in_use) == 2 + MAX_PASSED)
    done.set()
    await asyncio.gather(*tasks, *late)
    assert "b" not in holder.loads


async def test_a_failed_load_is_everyones_error_and_is_tried_again() -> None:
    holder, done = Holder(1), asyncio.Event()
    holder.damaged.add("a")
    tasks = [holder.start("a", done) for _ in range(3)]
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(error) for error in errors] == ["a is damaged"] * 3
    assert holder.held == {}
    holder.damaged.clear()
    async with holder.use("a"):
        holder.adapters.check_integrity()
    assert holder.loads == ["a", "a"]


async def test_a_load_that_nobody_waits_for_any_more_ends() -> None:
    holder, done = Holder(1), asyncio.Event()
    holder.gate.clear()
    task = holder.start("a", done)
    await settle()
    task.cancel()
    other = holder.start("b", done)
    await settle()
    assert holder.loads == ["a"]
    holder.gate.set()
    done.set()
    await other
    assert list(holder.held.values()) == ["b"]
    assert holder.most == 1


@pytest.mark.parametrize("capacity", [1, 3])
async def test_random_traffic_keeps_the_invariants(capacity: int) -> None:
    holder, rng = Holder(capacity), random.Random(capacity)
    holder.damaged.add("f")

    async def run(name: str, turns: int) -> None:
        with suppress(OSError):
            async with holder.use(name):
                for _ in range(turns):
                    await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    for _ in range(400):
        tasks.append(asyncio.create_task(run(rng.choice("abcdef"), rng.randrange(12))))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    holder.adapters.check_integrity()
    assert holder.most <= capacity
    assert holder.in_use == []
    assert set(holder.held.values()) <= set("abcde")
    for name in "abcde":
        async with holder.use(name):
            pass
