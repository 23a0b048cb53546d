"""Soft prompts in host memory, between the store's files and the key/value blocks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open

from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from prompt_store.types import ROWS_TENSOR, TASK_COLS_TENSOR, TASK_ROWS_TENSOR
from server.engine.adapters.classification_head import ClassificationHead, read_head
from server.engine.adapters.weights import is_finite
from server.engine.background_jobs import BackgroundJobs
from server.engine.stats import EngineTierStats
from server.engine.types import SoftPromptSource


class SoftPromptLoadError(Exception):
    """A soft prompt's file cannot be read, or does not match its record."""


@dataclass(slots=True)
class _Entry:
    source: SoftPromptSource
    ref_count: int = 0
    rows: torch.Tensor | None = None
    head: ClassificationHead | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded tensors."""
        return (0 if self.rows is None else self.rows.nbytes) + (0 if self.head is None else self.head.nbytes)


class SoftPromptLoader:
    """Reads soft prompts in a separate thread and caches them in host memory.

    A soft prompt stays in memory while a sequence or a pin refers to it. The others are cached up to a budget, and
    the least recently used are evicted first. All methods but ``read`` are called from the engine's thread.

    Args:
        embedding_width: Columns of a soft prompt of embeddings.
        key_values_width: Columns of a soft prompt of keys and values.
        head_width: Columns of a classification head.
        dtype: The serving dtype; rows are cast to it when they are read. PEFT casts them when they are used.
        budget_bytes: Host memory for soft prompts without references.
        on_loaded: Called from the reading thread after each file, to wake the engine.
    """

    def __init__(
        self,
        *,
        embedding_width: int,
        key_values_width: int,
        head_width: int,
        dtype: torch.dtype,
        budget_bytes: int,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._widths = {False: embedding_width, True: key_values_width}
        self._head_width = head_width
        self._dtype = dtype
        self._budget = budget_bytes
        self._entries: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._idle_bytes = 0
        self._pinned: dict[str, SoftPromptSource] = {}
        self._resident_bytes = 0
        self._num_resident = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0
        self._load_seconds = Histogram.empty(LOAD_SECONDS_BOUNDS)
        self._jobs = BackgroundJobs[str, tuple[torch.Tensor, ClassificationHead | None, float]](
            "soft-prompt-loader", on_ended=on_loaded
        )

    @property
    def stats(self) -> EngineTierStats:
        """The current state, and counters since the start."""
        return EngineTierStats(
            resident=self._num_resident,
            resident_bytes=self._resident_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            load_seconds=self._load_seconds,
        )

    @property
    def digests(self) -> Iterator[str]:
        """Digests of what is in memory: first what is used or pinned, then the rest, the last used first."""
        yield from dict.fromkeys(
            entry.source.digest for entry in self._entries.values() if entry.ref_count and entry.rows is not None
        )
        yield from dict.fromkeys(self._entries[identity].source.digest for identity in reversed(self._idle))

    def acquire(self, source: SoftPromptSource) -> bool:
        """Refer to a soft prompt, and start to read it if it is not in memory.

        Returns:
            Whether its rows are in memory already; otherwise ``take_loaded`` reports it.
        """
        if source.identity in self._entries:
            self._hits += 1
        else:
            self._misses += 1
        return self._refer(source)

    def release(self, source: SoftPromptSource) -> None:
        """Release one reference."""
        entry = self._entries[source.identity]
        entry.ref_count -= 1
        if entry.ref_count == 0 and entry.rows is not None:
            self._make_idle(source.identity, entry)

    def pin(self, source: SoftPromptSource) -> None:
        """Keep a soft prompt in memory until ``unpin``; repeated calls have no effect.

        If its file cannot be read, the pin ends, and ``take_loaded`` reports the error.
        """
        if source.identity not in self._pinned:
            self._pinned[source.identity] = source
            self._refer(source)

    def unpin(self, source: SoftPromptSource) -> None:
        """End a pin, if there is one."""
        if self._pinned.pop(source.identity, None) is not None:
            self.release(source)

    def rows(self, source: SoftPromptSource) -> torch.Tensor:
        """A loaded soft prompt: [num_virtual_tokens, embedding or key/value width], serving dtype, on the host."""
        rows = self._entries[source.identity].rows
        if rows is None:
            raise AssertionError(f"soft prompt {source.identity} is not loaded")
        return rows

    def head(self, source: SoftPromptSource) -> ClassificationHead:
        """The classification head of a loaded soft prompt."""
        head = self._entries[source.identity].head
        if head is None:
            raise AssertionError(f"soft prompt {source.identity} has no head")
        return head

    def take_loaded(self) -> list[tuple[str, str | None]]:
        """Identities whose reading has ended since the last call, each with its error or None."""
        ended: list[tuple[str, str | None]] = []
        for identity, result in self._jobs.take_ended():
            if isinstance(result, BaseException):
                del self._entries[identity]
                self._pinned.pop(identity, None)
                ended.append((identity, str(result)))
                continue
            entry = self._entries[identity]
            entry.rows, entry.head, seconds = result
            self._num_resident += 1
            self._resident_bytes += entry.nbytes
            self._load_seconds.observe(LOAD_SECONDS_BOUNDS, seconds)
            if entry.ref_count == 0:  # all references were released meanwhile
                self._make_idle(identity, entry)
            ended.append((identity, None))
        return ended

    def close(self) -> None:
        """End the reading thread."""
        self._jobs.close()

    def _refer(self, source: SoftPromptSource) -> bool:
        entry = self._entries.get(source.identity)
        if entry is None:
            entry = self._entries[source.identity] = _Entry(source)
            self._jobs.submit(source.identity, lambda _: self._timed_read(source))
        elif entry.ref_count == 0 and entry.rows is not None:
            del self._idle[source.identity]
            self._idle_bytes -= entry.nbytes
        entry.ref_count += 1
        return entry.rows is not None

    def _make_idle(self, identity: str, entry: _Entry) -> None:
        self._idle[identity] = None
        self._idle_bytes += entry.nbytes
        while self._idle_bytes > self._budget:
            oldest, _ = self._idle.popitem(last=False)
            size = self._entries.pop(oldest).nbytes
            self._idle_bytes -= size
            self._resident_bytes -= size
            self._num_resident -= 1
            self._evictions += 1

    def _timed_read(self, source: SoftPromptSource) -> tuple[torch.Tensor, ClassificationHead | None, float]:
        started = time.perf_counter()
        rows = self.read(source)
        head = None
        if source.num_labels is not None:
            try:
                head = read_head(source.path, num_labels=source.num_labels, width=self._head_width)
            except Exception as error:
                raise SoftPromptLoadError(f"the head of {source.digest[:12]} cannot be read: {error}") from error
        return rows, head, time.perf_counter() - started

    def read(self, source: SoftPromptSource) -> torch.Tensor:
        """Read a soft prompt's file, from any thread, without caching it.

        Computations are in float32, and float64 is cast to float32 first, because PEFT's encoders are float32
        whatever the file's dtype.

        Returns:
            The rows in the serving dtype: [num_virtual_tokens, embedding or key/value width].

        Raises:
            SoftPromptLoadError: If the file cannot be read, or does not match its record.
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
        rows = rows.to(self._dtype)
        if not is_finite(rows):  # the upload was checked in the dtype that was served then
            dtype = str(self._dtype).removeprefix("torch.")
            raise SoftPromptLoadError(f"soft prompt {source.digest[:12]} holds a value that is not finite in {dtype}")
        return rows
