"""Soft prompts in host memory, on their way from the store's files to key/value blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from safetensors import safe_open

from prompt_store.types import ROWS_TENSOR, TASK_COLS_TENSOR, TASK_ROWS_TENSOR
from server.engine.types import SoftPromptSource


class SoftPromptLoadError(Exception):
    """A soft prompt's file cannot be read, or does not hold what its record says."""


@dataclass(slots=True)
class _Entry:
    source: SoftPromptSource
    ref_count: int = 0
    rows: torch.Tensor | None = None


class SoftPromptLoader:
    """Reads soft prompts in a thread of its own and keeps them in host memory.

    What a living sequence refers to stays; the rest is kept up to a budget, least recently used out first. All
    methods are called from the engine's thread; only the reading happens elsewhere.

    Args:
        embedding_width: Columns of a soft prompt made of embeddings.
        key_values_width: Columns of one made of keys and values.
        dtype: The serving dtype; rows are cast to it when read, as PEFT casts them at use.
        budget_bytes: Host memory for soft prompts that nobody refers to.
        on_loaded: Called from the reading thread after each file, to wake the engine.
    """

    def __init__(
        self,
        *,
        embedding_width: int,
        key_values_width: int,
        dtype: torch.dtype,
        budget_bytes: int = 256 * 1024 * 1024,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._widths = {False: embedding_width, True: key_values_width}
        self._dtype = dtype
        self._budget = budget_bytes
        self._on_loaded = on_loaded
        self._entries: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._idle_bytes = 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="soft-prompt-loader")
        self._done: SimpleQueue[tuple[str, Future[torch.Tensor]]] = SimpleQueue()

    def acquire(self, source: SoftPromptSource) -> bool:
        """Refer to a soft prompt, and start reading it where nobody has.

        Returns:
            Whether its rows are in memory already; otherwise ``take_loaded`` will tell.
        """
        entry = self._entries.get(source.identity)
        if entry is None:
            entry = self._entries[source.identity] = _Entry(source)
            future = self._executor.submit(self._read, source)
            future.add_done_callback(lambda done: self._announce(source.identity, done))
        elif entry.ref_count == 0 and entry.rows is not None:
            del self._idle[source.identity]
            self._idle_bytes -= entry.rows.nbytes
        entry.ref_count += 1
        return entry.rows is not None

    def release(self, source: SoftPromptSource) -> None:
        """Give back one reference."""
        entry = self._entries[source.identity]
        entry.ref_count -= 1
        if entry.ref_count == 0 and entry.rows is not None:
            self._make_idle(source.identity, entry.rows)

    def rows(self, source: SoftPromptSource) -> torch.Tensor:
        """A loaded soft prompt: [num_virtual_tokens, embedding or key/value width], serving dtype, on the host."""
        rows = self._entries[source.identity].rows
        if rows is None:
            raise AssertionError(f"soft prompt {source.identity} is not loaded")
        return rows

    def take_loaded(self) -> list[tuple[str, str | None]]:
        """Identities whose reading has ended since the last call, each with what went wrong or None."""
        ended: list[tuple[str, str | None]] = []
        while True:
            try:
                identity, future = self._done.get_nowait()
            except Empty:
                return ended
            error = future.exception()
            if error is not None:
                del self._entries[identity]
                ended.append((identity, str(error)))
                continue
            entry = self._entries[identity]
            entry.rows = future.result()
            if entry.ref_count == 0:  # everybody who wanted it has gone meanwhile
                self._make_idle(identity, entry.rows)
            ended.append((identity, None))

    def close(self) -> None:
        """End the reading thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _announce(self, identity: str, future: Future[torch.Tensor]) -> None:
        self._done.put((identity, future))
        self._on_loaded()

    def _make_idle(self, identity: str, rows: torch.Tensor) -> None:
        self._idle[identity] = None
        self._idle_bytes += rows.nbytes
        while self._idle_bytes > self._budget:
            oldest, _ = self._idle.popitem(last=False)
            evicted = self._entries.pop(oldest).rows
            self._idle_bytes -= evicted.nbytes if evicted is not None else 0

    def _read(self, source: SoftPromptSource) -> torch.Tensor:
        """The rows in the serving dtype: [num_virtual_tokens, embedding or key/value width].

        All that is computed is computed in float32, and F64 passes through it, because PEFT's encoders hold float32
        whatever the file holds.
        """
        try:
            with safe_open(source.path, framework="pt") as file:
                rows: torch.Tensor = file.get_tensor(ROWS_TENSOR)
                is_multitask = TASK_COLS_TENSOR in file.keys()  # noqa: SIM118 - the file is no mapping
                if is_multitask != (source.task_id is not None):
                    raise SoftPromptLoadError("a multitask prompt needs a task id, and no other prompt takes one")
                factors = [
                    file.get_slice(name)[source.task_id : source.task_id + 1]
                    for name in (TASK_COLS_TENSOR, TASK_ROWS_TENSOR)
                    if source.task_id is not None
                ]
        except Exception as error:
            raise SoftPromptLoadError(f"soft prompt {source.digest[:12]} cannot be read: {error}") from error
        expected = (source.num_virtual_tokens, self._widths[source.is_key_values])
        if tuple(rows.shape) != expected:
            raise SoftPromptLoadError(
                f"soft prompt {source.digest[:12]} has shape {tuple(rows.shape)}; this model needs {expected}"
            )
        if factors:
            if not all(len(factor) == 1 for factor in factors):
                raise SoftPromptLoadError(f"soft prompt {source.digest[:12]} has no task {source.task_id}")
            cols, task_rows = (factor.float() for factor in factors)
            rows = rows.float() * torch.matmul(cols, task_rows)[0]
        elif rows.dtype == torch.float64:
            rows = rows.float()
        return rows.to(self._dtype)
