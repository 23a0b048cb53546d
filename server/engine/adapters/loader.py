"""Adapters in the memory that the forward pass reads, between the store's files and the pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from prompt_store.histogram import LOAD_SECONDS_BOUNDS, Histogram
from server.config import EngineSettings
from server.engine.adapters.weights import AdapterWeights
from server.engine.background_jobs import BackgroundJobs
from server.engine.scheduling.adapter_memory import AdapterMemory
from server.engine.stats import EngineTierStats
from server.engine.types import AdapterSource, ErrorCode, RequestFailure

logger = logging.getLogger(__name__)


def held_adapter_bytes(settings: EngineSettings, *, has_own_memory: bool) -> int:
    """Memory for the adapters of running sequences: the device's, too, if it has memory of its own."""
    host = settings.adapter_host_bytes
    return min(host, settings.adapter_device_bytes) if has_own_memory else host


class AdapterLoader:
    """Reads adapters in a separate thread, and keeps the weights of those that ``memory`` has room for.

    All methods are called from the engine's thread.

    Args:
        read: Reads an adapter's files, in the thread; raises if that fails.
        bytes_per_parameter: Bytes of an element in the serving dtype.
        budget_bytes: Memory for adapters: of the device if it has its own, else of the host.
        held_bytes: Memory for the adapters of running sequences; None for no further limit.
        on_loaded: Called from the thread after each read, to wake the engine.

    Attributes:
        memory: Which adapters are in memory, and for which sequences.
    """

    def __init__(
        self,
        read: Callable[[AdapterSource], AdapterWeights],
        *,
        bytes_per_parameter: int,
        budget_bytes: int,
        held_bytes: int | None = None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.memory = AdapterMemory(
            self, budget_bytes=budget_bytes, bytes_per_parameter=bytes_per_parameter, held_bytes=held_bytes
        )
        self._read = read
        self._weights: dict[str, AdapterWeights] = {}
        self._load_seconds = Histogram.empty(LOAD_SECONDS_BOUNDS)
        self._jobs = BackgroundJobs[str, tuple[AdapterWeights, float]]("adapter-loader", on_ended=on_loaded)

    @property
    def stats(self) -> EngineTierStats:
        """The current state, and counters since the start."""
        counters = self.memory.stats
        return EngineTierStats(
            resident=self.memory.num_resident,
            resident_bytes=self.memory.resident_bytes,
            hits=counters.hits,
            misses=counters.misses,
            evictions=counters.evictions,
            load_seconds=self._load_seconds,
        )

    @property
    def digests(self) -> list[str]:
        """Digests of the adapters in memory."""
        return list(self._weights)

    def weights(self, source: AdapterSource) -> AdapterWeights:
        """The weights of an adapter that a sequence holds."""
        return self._weights[source.identity]

    def start(self, source: AdapterSource) -> None:
        """Start to read an adapter. For ``memory`` only."""
        self._jobs.submit(source.identity, lambda _: self._timed_read(source))

    def drop(self, identity: str) -> None:
        """Free the weights of an adapter. For ``memory`` only."""
        del self._weights[identity]

    def take_loaded(self) -> list[tuple[str, RequestFailure | None]]:
        """Identities whose reading has ended since the last call.

        Returns:
            Each with the failure of the sequences that need it, or None.
        """
        ended: list[tuple[str, RequestFailure | None]] = []
        for identity, result in self._jobs.take_ended():
            if isinstance(result, BaseException):
                logger.error("adapter %s cannot be read: %s", identity[:12], result)
                self.memory.end_read(identity, None)
                ended.append((identity, RequestFailure(ErrorCode.FAILED, str(result))))
                continue
            weights, seconds = result
            self._weights[identity] = weights
            self._load_seconds.observe(LOAD_SECONDS_BOUNDS, seconds)
            refused = self.memory.end_read(identity, weights.nbytes)
            message = f"adapter {identity[:12]} has no room: {refused}"
            ended.append((identity, None if refused is None else RequestFailure(ErrorCode.REFUSED, message)))
        self.memory.read_pins()
        return ended

    def pin(self, source: AdapterSource) -> None:
        """Keep an adapter in memory until ``unpin``, unless it never fits; repeated calls have no effect."""
        try:
            self.memory.pin(source)
        except ValueError as error:
            logger.warning("adapter %s cannot be pinned: %s", source.identity[:12], error)

    def unpin(self, source: AdapterSource) -> None:
        """End a pin, if there is one."""
        self.memory.unpin(source)

    def close(self) -> None:
        """End the thread."""
        self._jobs.close()

    def _timed_read(self, source: AdapterSource) -> tuple[AdapterWeights, float]:
        started = time.perf_counter()
        weights = self._read(source)
        return weights, time.perf_counter() - started
