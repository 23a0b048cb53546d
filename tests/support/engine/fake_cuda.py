"""A fake of torch.cuda on the host: operations that wait for a GPU, recorded captures, and events.

Operations of all streams are computed at once, so the order is that of the calls. Launches in Triton's interpreter
are recorded and replayed like torch's operations.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from server.engine.adapters.backend import PlainAdapters
from server.engine.attention.backend import AttentionCall, AttentionMetadata, SDPABackend
from server.engine.model.platform import CUDAPlatform
from tests.support.engine.live_bytes import LiveBytes

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal"}
"""Operations that return a number to Python, or a tensor whose shape depends on its content."""

_ERROR = 2
"""Of ``torch.cuda.set_sync_debug_mode``."""

DEFAULT_STREAM = "the default stream"


def waits(function: Any, arguments: Any) -> bool:
    """Whether an operation waits for the device, by its arguments."""
    name = function.overloadpacket.__name__
    if name in {"index", "index_put", "index_put_"}:
        return any(index is not None and index.dtype is torch.bool for index in arguments[1])
    return name in WAITING


@dataclass(kw_only=True)
class FakeMemory:
    """The memory of a made-up GPU. Tensors are counted while ``live`` is entered.

    Attributes:
        total: Memory of the device.
        others: What other processes use, and the CUDA context.
        per_graph: What each graph uses, outside of torch.
        extra_peak: What every peak is higher than what was counted, as by buffers within operations.
        live: Counts the tensors.
    """

    total: int = 2**40
    others: int = 0
    per_graph: int = 0
    extra_peak: int = 0
    live: LiveBytes = field(default_factory=lambda: LiveBytes(torch.device("cpu")))


class FakeCUDA(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the parts of torch.cuda that record graphs; operations are seen while it is entered.

    Args:
        patch: Restores torch.cuda.
        breaks_captures: Let every capture fail when it ends, as after an operation that torch does not detect.
        stays_broken: Let the allocator fail after a failed capture, as up to torch 2.11.
        memory: The device's memory.

    Attributes:
        num_captures: Calls of ``capture_begin``.
        num_replays: Calls of ``replay``.
        num_waits: Operations that raised because they wait.
        mode: The sync debug mode.
        events: What was done with events: "record", "wait" or "synchronize", the event's number, the current stream.
        on_synchronize: Called when a thread waits for an event.
        memory: The device's memory.
        graphs: Graphs that are not released.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *,
        breaks_captures: bool = False,
        stays_broken: bool = False,
        memory: FakeMemory | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_captures = self.num_replays = self.num_waits = self.mode = 0
        self.events: list[tuple[str, int, object]] = []
        self.on_synchronize: Callable[[], None] = lambda: None
        self._own = threading.local()
        self._num_streams = self._num_events = 0
        self.memory = memory or FakeMemory()
        self.graphs: WeakSet[_Graph] = WeakSet()
        self._breaks_captures, self._stays_broken = breaks_captures, stays_broken
        self._recording: list[tuple[Any, ...]] | None = None
        self._is_invalid = self._is_poisoned = False
        for name, value in {
            "CUDAGraph": lambda: _Graph(self),
            "Event": lambda **_: self._make_event(),
            "Stream": lambda _device=None: self._make_stream(),
            "current_stream": lambda: self.stream,
            "empty_cache": self._empty_cache,
            "get_sync_debug_mode": lambda: self.mode,
            "graph_pool_handle": lambda: (0, 1),
            "max_memory_allocated": lambda _: self.memory.live.peak + self.memory.extra_peak,
            "mem_get_info": lambda _: (self.memory.total - self.used, self.memory.total),
            "memory_allocated": lambda _: self.memory.live.current,
            "memory_reserved": lambda _: self.memory.live.current,
            "reset_peak_memory_stats": lambda _: self.memory.live.reset_peak(),
            "set_stream": self._set_stream,
            "set_sync_debug_mode": self._set_mode,
            "stream": lambda stream: _OnStream(self, stream),
            "synchronize": self._synchronize,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.graph, "default_capture_stream", None)
        self._record_launches(patch)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    def _record_launches(self, patch: pytest.MonkeyPatch) -> None:
        interpreter = sys.modules.get("triton.runtime.interpreter")
        if interpreter is None:
            return
        launch = interpreter.GridExecutor.__call__

        def recorded(executor: Any, *arguments: Any, **named: Any) -> None:
            with _disable_current_modes():
                launch(executor, *arguments, **named)
            if self._recording is not None:
                self._recording.append((launch, (executor, *arguments), named, None))

        patch.setattr(interpreter.GridExecutor, "__call__", recorded)

    @property
    def stream(self) -> object:
        """The current stream of the thread."""
        return getattr(self._own, "stream", DEFAULT_STREAM)

    @stream.setter
    def stream(self, stream: object) -> None:
        self._own.stream = stream

    def _make_stream(self) -> str:
        self._num_streams += 1
        return f"stream {self._num_streams}"

    def _make_event(self) -> _Event:
        self._num_events += 1
        return _Event(self, self._num_events)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        is_float32_experts = function.overloadpacket.__name__ == "_grouped_mm" and arguments[0].dtype is torch.float32
        if is_float32_experts or waits(function, arguments):
            self._wait()
        result = function(*arguments, **(named or {}))
        if self._recording is not None:
            self._recording.append((function, arguments, named or {}, result))
        return result

    @property
    def used(self) -> int:
        """Memory that is in use."""
        return self.memory.others + len(self.graphs) * self.memory.per_graph + self.memory.live.current

    def _wait(self) -> None:
        if self._recording is not None:
            self._is_invalid = True
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
        if self.mode == _ERROR:
            self.num_waits += 1
            raise RuntimeError("called a synchronizing CUDA operation")

    def _synchronize(self, _device: object = None) -> None:
        if self._recording is not None:  # it does not depend on the debug mode
            self._wait()

    def _empty_cache(self) -> None:
        if self._is_poisoned:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def _set_mode(self, mode: int | str) -> None:
        self.mode = ["default", "warn", "error"].index(mode) if isinstance(mode, str) else mode

    def _set_stream(self, stream: object) -> None:
        self.stream = stream

    def begin(self) -> None:
        """``CUDAGraph.capture_begin``."""
        assert self.stream != DEFAULT_STREAM
        self.num_captures += 1
        self._recording, self._is_invalid = [], self._breaks_captures

    def end(self) -> list[tuple[Any, ...]]:
        """``CUDAGraph.capture_end``; returns the operations."""
        recorded, self._recording = self._recording, None
        if self._is_invalid:
            self._is_poisoned = self._stays_broken
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        assert recorded is not None
        return recorded


class _Event:
    """``torch.cuda.Event``."""

    def __init__(self, cuda: FakeCUDA, number: int) -> None:
        self._cuda, self._number = cuda, number

    def record(self) -> None:
        self._note("record")

    def wait(self) -> None:
        self._note("wait")

    def synchronize(self) -> None:
        self._note("synchronize")
        self._cuda.on_synchronize()

    def _note(self, what: str) -> None:
        self._cuda.events.append((what, self._number, self._cuda.stream))


class _OnStream:
    """``torch.cuda.stream``."""

    def __init__(self, cuda: FakeCUDA, stream: object) -> None:
        self._cuda, self._stream, self._before = cuda, stream, cuda.stream

    def __enter__(self) -> None:
        self._cuda.stream = self._stream

    def __exit__(self, *_: object) -> None:
        self._cuda.stream = self._before


class _Graph:
    def __init__(self, cuda: FakeCUDA) -> None:
        self._cuda = cuda
        cuda.graphs.add(self)
        self._recorded: list[tuple[Any, ...]] = []

    def capture_begin(self, *_: object, **__: object) -> None:
        self._cuda.begin()

    def capture_end(self) -> None:
        self._recorded = self._cuda.end()

    def replay(self) -> None:
        """Compute the operations again, over the same tensors."""
        self._cuda.num_replays += 1
        for function, arguments, named, result in self._recorded:
            again = function(*arguments, **named)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recordable(SDPABackend):
    """SDPA that may be recorded; faster than Triton's interpreter."""

    is_capturable = True

    def attend(
        self, query: torch.Tensor, layer: int, metadata: AttentionMetadata, call: AttentionCall
    ) -> torch.Tensor:
        # A replay reads other positions, so nothing may be left from the run before the capture.
        metadata.past_end.clear()
        metadata.masks.clear()
        return super().attend(query, layer, metadata, call)


def host_cuda_platform(patch: pytest.MonkeyPatch) -> CUDAPlatform:
    """A ``CUDAPlatform`` on the host, whose kernels run in Triton's interpreter and whose steps are not recorded."""
    with patch.context() as found:
        found.setattr(torch.cuda, "is_available", lambda: True)
        found.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4))
        platform = CUDAPlatform(torch.device("cpu"))
    for name in ("recorder", "device_memory", "copy_stream"):
        patch.setattr(platform, name, lambda: None)
    return platform


def fake_cuda_platform(patch: pytest.MonkeyPatch, *, has_adapter_kernels: bool = False) -> CUDAPlatform:
    """A ``CUDAPlatform`` on the host, whose attention may be recorded. ``FakeCUDA`` has to replace torch.cuda.

    Triton's interpreter is slow, so layers are not fused, and adapters run by torch's operations.

    Args:
        patch: Restores what is replaced.
        has_adapter_kernels: Let adapters run in Triton's interpreter, so that steps with them are recorded.
    """
    with patch.context() as own:
        platform = host_cuda_platform(own)
    platform.backends = (Recordable,)
    patch.setattr(platform, "prepare", lambda _model: None)
    if not has_adapter_kernels:
        patch.setattr(platform, "adapter_backend", lambda products, device, _: PlainAdapters(products, device))
    return platform
