"""vLLM as the engine, without the API: an ``AsyncEngine`` on the event loop of a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from server.config import EngineSettings
from server.engine.process.async_engine import AsyncEngine
from server.engine.types import GenerateRequest, SoftPromptSource
from tests.support.engine.harness import Family, greedy
from tests.support.vllm import PYTHON, Question

MAX_TOKENS = 8
IN_THE_CORE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
"""Variables with which vLLM's core runs its only worker itself, so that one process less imports vLLM at a start.

Servers in these tests, and engines with several ranks, have a process for each worker, as users' have on CPUs.
"""
Result = TypeVar("Result")


class Engine:
    """An engine on the event loop of a thread; a context manager.

    Args:
        family: Its model.
        host_bytes: Host memory of unused soft prompts.
        more: Settings; those not named are small.

    Raises:
        EngineStartError: If it does not start.
    """

    def __init__(self, family: Family, host_bytes: int, **more: Any) -> None:
        self.family = family
        self._answers: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}
        self._environment = pytest.MonkeyPatch()
        if more.get("tensor_parallel_size", 1) == 1:
            for name, value in IN_THE_CORE.items():
                self._environment.setenv(name, value)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        defaults: dict[str, Any] = {
            "kv_cache_memory": 4 * 2**20,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 64,
        }
        settings = EngineSettings(
            model=str(family.path),
            dtype="float32",
            engine="vllm",
            engine_python=PYTHON,
            soft_prompt_host_bytes=host_bytes,
            enforce_eager=True,
            num_threads=1,
            **(defaults | more),
        )
        self.engine = AsyncEngine(settings)
        self.num_requests = 0
        try:
            self.run(self.engine.start())
        except BaseException:
            self.close()  # a thread that goes on would keep pytest from ending
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.submit(work).result(600)

    def close(self) -> None:
        """End the engine, whether it has started or not, and the thread."""
        self._environment.undo()
        try:
            self.run(self.engine.stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def ask(
        self, source: SoftPromptSource | None, text: list[int], *, stop_after: int | None = None, **more: Any
    ) -> list[int]:
        """Greedy tokens, or the first of them if the request is aborted then."""
        self.num_requests += 1
        request = GenerateRequest(
            request_id=str(self.num_requests),
            prompt_token_ids=text,
            params=more.pop("params", greedy(MAX_TOKENS)),
            soft_prompt=source,
            **more,
        )
        tokens: list[int] = []
        if stop_after == 0:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001 * (self.num_requests % 7)):
                    async for _ in self.engine.generate(request):
                        await asyncio.sleep(1)
            return tokens
        async with aclosing(self.engine.generate(request)) as events:
            async for event in events:
                tokens += event.token_ids
                if stop_after is not None and len(tokens) >= stop_after:
                    break
        return tokens

    async def ask_all(self, asked: Sequence[Question], **more: Any) -> list[list[int]]:
        return await asyncio.gather(*(self.ask(self.family.source(key), text, **more) for key, text in asked))

    def check(self, asked: Sequence[Question], **more: Any) -> None:
        """The engine lives, answers as PEFT does, and holds no block."""
        assert self.run(self.ask_all(asked, **more)) == [self._answer(*question) for question in asked]
        assert self.engine.stats.restarts == 0
        assert self.engine.stats.num_used_blocks == 0

    def _answer(self, key: str | None, text: list[int]) -> list[int]:
        """PEFT's tokens, computed once."""
        question = key, tuple(text)
        if question not in self._answers:
            self._answers[question] = self.family.expected(key, text, MAX_TOKENS)
        return self._answers[question]


def expected(family: Family, asked: Sequence[Question]) -> list[list[int]]:
    return [family.expected(key, text, MAX_TOKENS) for key, text in asked]


def copy_of(source: SoftPromptSource, folder: Path, name: str) -> SoftPromptSource:
    """The same soft prompt in another file, under another digest."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(Path(source.path).read_bytes())
    return SoftPromptSource(
        digest=name,
        num_virtual_tokens=source.num_virtual_tokens,
        is_key_values=source.is_key_values,
        path=str(path),
    )
