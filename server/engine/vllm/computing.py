"""Soft prompts of embeddings, each computed by vLLM once and then kept by the connector under its identity."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from server.engine.types import SoftPromptSource

MAX_KNOWN = 65_536
"""Identities that are remembered as computed. Forgetting one costs a pass of one token."""


class Computations:
    """Computes each soft prompt once, however many requests wait for it.

    A request that stops waiting does not stop the computation, unless no other waits.

    Args:
        compute: Computes a soft prompt, with vLLM's form of an adapter if there is one; what it raises is raised to
            all that wait.
    """

    def __init__(self, compute: Callable[[SoftPromptSource, Any], Awaitable[None]]) -> None:
        self._compute = compute
        self._known: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._num_waiting: dict[str, int] = {}

    async def ensure(self, source: SoftPromptSource, lora: Any = None) -> None:
        """Wait until a soft prompt has been computed.

        Args:
            source: The soft prompt; its identity tells the adapter, too (``source_with``).
            lora: vLLM's form of the adapter, which all that wait hold.
        """
        identity = source.identity
        if identity in self._known:
            self._known.move_to_end(identity)
            return
        task = self._running.get(identity)
        if task is None:
            task = self._running[identity] = asyncio.ensure_future(self._run(source, lora))
            task.add_done_callback(lambda done: self._end(identity, done))
        self._num_waiting[identity] = self._num_waiting.get(identity, 0) + 1
        try:
            await asyncio.shield(task)
        finally:
            self._num_waiting[identity] -= 1
            if not self._num_waiting[identity]:
                del self._num_waiting[identity]
                if self._running.get(identity) is task:
                    del self._running[identity]  # a request that comes now must not wait for this one
                    task.cancel()

    def forget(self, identity: str) -> None:
        """The connector does not hold this any more."""
        self._known.pop(identity, None)

    async def _run(self, source: SoftPromptSource, lora: Any) -> None:
        await self._compute(source, lora)
        self._known[source.identity] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _end(self, identity: str, task: asyncio.Task[None]) -> None:
        if self._running.get(identity) is task:
            del self._running[identity]
        if not task.cancelled():
            task.exception()  # all that waited may be gone
