"""Fair turns of tenants in shared threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.fair_work import SHORT_CHARS, FairThreads, current_work, working_for
from tests.support.waiting import until

LONG = SHORT_CHARS + 1


@pytest.fixture
async def threads() -> AsyncIterator[FairThreads]:
    made = FairThreads(2, name="test")
    yield made
    made.close()


class Steps:
    """Work that waits for a gate, and the order in which it began."""

    def __init__(self, threads: FairThreads) -> None:
        self.threads = threads
        self.began: list[str] = []
        self.gates: dict[str, threading.Event] = {}

    def start(self, tenant: str, name: str, size: int) -> asyncio.Task[None]:
        gate = self.gates[name] = threading.Event()

        def work() -> None:
            self.began.append(name)
            gate.wait(20)

        with working_for(tenant):  # the task copies the context
            return asyncio.create_task(self.threads.run(work, size=size))


@pytest.mark.anyio
async def test_a_short_text_does_not_wait_for_long_ones(threads: FairThreads) -> None:
    steps = Steps(threads)
    tasks = [steps.start("a", f"long{index}", LONG) for index in range(3)]
    await until(lambda: steps.began == ["long0"])
    tasks.append(steps.start("b", "short", 10))
    await until(lambda: steps.began == ["long0", "short"])
    for gate in steps.gates.values():
        gate.set()
    await asyncio.gather(*tasks)
    assert steps.began == ["long0", "short", "long1", "long2"]


@pytest.mark.anyio
async def test_tenants_take_turns(threads: FairThreads) -> None:
    steps = Steps(threads)
    tasks = [steps.start("a", f"a{index}", 1000) for index in range(6)]
    await until(lambda: len(steps.began) == 2)
    tasks += [steps.start("b", f"b{index}", 1000) for index in range(2)]
    await asyncio.sleep(0)  # let the tasks start waiting
    steps.gates["a0"].set()
    await until(lambda: len(steps.began) == 3)
    steps.gates["b0"].set()
    await until(lambda: len(steps.began) == 4)
    for gate in steps.gates.values():
        gate.set()
    await asyncio.gather(*tasks)
    assert steps.began[2] == "b0"
    assert "b1" in steps.began[3:5]


@pytest.mark.anyio
async def test_work_cancelled_while_waiting_does_not_run(threads: FairThreads) -> None:
    steps = Steps(threads)
    running = [steps.start("a", name, 1) for name in ("first", "second")]
    await until(lambda: len(steps.began) == 2)
    waiting = steps.start("a", "third", 1)
    await asyncio.sleep(0)
    waiting.cancel()
    running[0].cancel()  # its thread still runs, so its place is not free
    with suppress(asyncio.CancelledError):
        await waiting
    last = steps.start("b", "last", 1)
    await until(lambda: "b" in threads._queues)
    assert steps.began == ["first", "second"]
    assert threads._num_running == 2
    for gate in steps.gates.values():
        gate.set()
    await asyncio.gather(last, *running, return_exceptions=True)
    assert steps.began == ["first", "second", "last"]
    assert await threads.run(lambda: 5, size=LONG) == 5


@pytest.mark.anyio
async def test_errors_are_raised_in_the_caller(threads: FairThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0, size=1)
    assert await threads.run(lambda: 7, size=1) == 7


def test_one_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two threads"):
        FairThreads(1, name="test")


@given(
    flood=st.lists(st.integers(1, 60_000), min_size=1, max_size=30),
    others=st.lists(st.integers(1, SHORT_CHARS), min_size=1, max_size=5),
)
def test_a_tenant_with_much_work_delays_only_itself(flood: list[int], others: list[int]) -> None:
    """Before a tenant's short jobs end, others process at most as many characters as it, plus running turns."""

    async def run() -> list[tuple[str, int]]:
        threads = FairThreads(2, name="test")
        ended: list[tuple[str, int]] = []
        gate = threading.Event()

        def work(tenant: str, size: int) -> None:
            gate.wait(20)
            ended.append((tenant, size))

        async def one(tenant: str, size: int) -> None:
            with working_for(tenant):
                await threads.run(lambda: work(tenant, size), size=size)

        tasks = [asyncio.create_task(one("flood", size)) for size in flood]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(one("other", size)) for size in others]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)
        assert threads._queues == {}
        threads.close()
        return ended

    ended = asyncio.run(run())
    assert sorted(ended) == sorted([("flood", size) for size in flood] + [("other", size) for size in others])
    last = max(index for index, (tenant, _) in enumerate(ended) if tenant == "other")
    before = sum(size for tenant, size in ended[:last] if tenant == "flood")
    # The running work, work that began beside it, and as much as the other tenant had.
    assert before <= sum(others) + 3 * 60_000 + 256 * (len(others) + 1)


def test_work_outside_of_requests_has_no_tenant() -> None:
    current_work().num_tokens += 1
    assert (current_work().tenant, current_work().num_tokens) == ("", 0)
    with working_for("a") as work:
        current_work().num_tokens += 2
        assert (work.tenant, work.num_tokens) == ("a", 2)
