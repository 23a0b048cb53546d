"""The prompt store's methods as coroutines: where they run, and what a cancellation leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prompt_store.errors import PromptNotFoundError
from prompt_store.store import PromptStore
from prompt_store.types import LeasedPrompt, PromptRef
from server.api.soft_prompts.async_store import AsyncPromptStore

pytestmark = pytest.mark.anyio

REF = PromptRef("a")


class SlowStore:
    """A store whose calls wait for ``gate``."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.finished: list[str] = []
        self.released: list[str] = []

    def resolve(self, ref: PromptRef, access: object = None) -> str:
        return self._wait(f"{ref.name} in {threading.current_thread().name}")

    def lease(self, ref: PromptRef, access: object) -> SimpleNamespace:
        return SimpleNamespace(version=SimpleNamespace(name=self._wait(ref.name), version=1, digest="d"))

    def delete_prompt(self, name: str, *, actor: str) -> None:
        raise PromptNotFoundError(f"{actor} cannot delete {name}")

    def release(self, leased: LeasedPrompt) -> None:
        self.released.append(leased.version.name)

    def _wait(self, result: str) -> str:
        self.begun.set()
        assert self.gate.wait(10)
        self.finished.append(result)
        return result


@pytest.fixture
def slow() -> SlowStore:
    return SlowStore()


@pytest.fixture
def store(slow: SlowStore) -> Iterator[AsyncPromptStore]:
    opened = AsyncPromptStore(cast("PromptStore", slow))
    yield opened
    slow.gate.set()
    opened.close(close_store=False)


async def cancelled_in_the_store(slow: SlowStore, coroutine: Any) -> asyncio.Task[Any]:
    """A task that was cancelled during its call of the store."""
    task = asyncio.create_task(coroutine)
    assert await asyncio.to_thread(slow.begun.wait, 10)
    task.cancel()
    return task


def test_every_method_is_the_stores_method_of_that_name() -> None:
    wrapped = {name for name, value in vars(AsyncPromptStore).items() if hasattr(value, "__wrapped__")}
    wrapped -= {"lease", "lease_for_request", "_leasing"}  # context managers
    assert {"resolve", "publish", "rollback"} <= wrapped
    for name in wrapped:
        assert getattr(AsyncPromptStore, name).__wrapped__ is getattr(PromptStore, name)


async def test_calls_run_in_the_pool(store: AsyncPromptStore, slow: SlowStore) -> None:
    slow.gate.set()
    assert cast("str", await store.resolve(REF)).startswith("a in prompt-store")
    with pytest.raises(PromptNotFoundError, match="me cannot delete x"):
        await store.delete_prompt("x", actor="me")


async def test_a_cancelled_call_ends_after_its_thread(store: AsyncPromptStore, slow: SlowStore) -> None:
    task = await cancelled_in_the_store(slow, store.resolve(REF))
    _, running = await asyncio.wait([task], timeout=0)
    assert running == {task}
    slow.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(slow.finished) == 1


async def test_a_lease_is_released_once_for_every_outcome(store: AsyncPromptStore, slow: SlowStore) -> None:
    async def use(error: type[BaseException] | None) -> None:
        async with store.lease(REF, None):
            if error is not None:
                raise error

    task = await cancelled_in_the_store(slow, use(None))
    with pytest.raises(asyncio.CancelledError):
        await task
    slow.gate.set()
    await use(None)
    for error in (ZeroDivisionError, asyncio.CancelledError):
        with pytest.raises(error):
            await use(error)
    await asyncio.to_thread(store.close, close_store=False)
    assert slow.released == ["a"] * 4


async def test_a_lease_that_cannot_be_released_is_logged(
    store: AsyncPromptStore, slow: SlowStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.gate.set()
    monkeypatch.delattr(SlowStore, "release")
    async with store.lease(REF, None):
        assert [version.digest for version in store.recent.all()] == ["d"]
    await asyncio.to_thread(store.close, close_store=False)
    assert "the lease of a@1 could not be released" in caplog.text
