"""The registry's adapters, as vLLM's LoRA."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from server.engine.stats import EngineStats
from server.engine.types import AdapterSource, ModelInfo
from server.engine.vllm.adapters.files import AdapterUnreadableError, write_folder
from server.engine.vllm.adapters.residency import Adapters


class Lora:
    """Loads adapters into vLLM, and unloads them.

    Args:
        llm: vLLM's ``AsyncLLM``.
        model: The loaded model; its ``modules`` can be adapted.
        capacity: Adapters that may be loaded at once.
        max_rank: The largest rank.
        stats: The engine's state.
    """

    def __init__(self, llm: Any, model: ModelInfo, *, capacity: int, max_rank: int, stats: EngineStats) -> None:
        self._llm = llm
        self._modules = model.modules
        self._max_rank = max_rank
        self._folder = TemporaryDirectory(prefix="prelude-adapters-", ignore_cleanup_errors=True)
        itemsize = getattr(torch, model.dtype).itemsize
        self._adapters = Adapters(self._load, self._unload, capacity, itemsize, stats)
        self._requests: dict[int, LoRARequest] = {}

    @asynccontextmanager
    async def use(self, source: AdapterSource | None) -> AsyncIterator[LoRARequest | None]:
        """Hold an adapter, when there is room for it.

        Raises:
            AdapterRefusedError: If vLLM cannot apply it to this base.
            AdapterUnreadableError: If it cannot be read or loaded.
        """
        async with self._adapters.use(source) as number:
            yield None if number is None else self._requests[number]

    def close(self) -> None:
        """Remove what is on the disk."""
        self._folder.cleanup()

    async def _load(self, source: AdapterSource, number: int) -> None:
        """Load an adapter; once it is in vLLM's memory, no file is needed."""
        folder = Path(self._folder.name) / str(number)
        request = LoRARequest(lora_name=source.digest, lora_int_id=number, lora_path=str(folder))
        try:
            await asyncio.to_thread(write_folder, source, folder, modules=self._modules, max_rank=self._max_rank)
            try:
                await self._llm.add_lora(request)
            except VllmDeadError:
                raise
            except Exception as error:
                raise AdapterUnreadableError(f"vLLM cannot load adapter {source.digest[:12]}: {error}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._requests[number] = request

    async def _unload(self, number: int) -> None:
        self._requests.pop(number, None)
        await self._llm.remove_lora(number)
