"""The connector in the scheduler's process: decides what is loaded where. It does not import vllm."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from server.engine.stats import EngineTierStats
from server.engine.vllm.residency import Read, Reported, Residency, State
from server.engine.vllm.use import Role, Use, use_of

MAX_PENDING_STEPS = 64
"""Steps whose times are kept until the next statistics."""

NULL_BLOCK = 0
"""vLLM's block that stands for positions which have left a sliding window."""

BlockIds = Sequence[Sequence[int]]
"""The blocks of a request, by cache group."""


class Request(Protocol):
    """What is needed of vLLM's request."""

    request_id: str
    kv_transfer_params: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Load:
    """Copy a resident soft prompt into blocks before this step's forward pass.

    Attributes:
        ticket: The soft prompt.
        first: The first position to copy; those before it are in the prefix cache.
        stop: The number of virtual tokens.
        block_ids: By cache group, the blocks from the first position of the request.
    """

    ticket: int
    first: int
    stop: int
    block_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Keep a copy of blocks after this step's forward pass."""

    ticket: int
    block_ids: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Commands:
    """What the workers do in one step: drop, read and load before it, save after it.

    Attributes:
        drops: Tickets.
        reads: Files.
        loads: Copies into blocks.
        saves: Copies from blocks.
        failed: Ids of requests whose soft prompt cannot be loaded.
    """

    drops: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class StepStats(msgspec.Struct, array_like=True):
    """One step: wall time, sequences, computed tokens, distinct soft prompts, distinct adapters."""

    seconds: float
    num_sequences: int
    num_tokens: int
    num_distinct: int
    num_adapters: int


class ConnectorStats(msgspec.Struct):
    """What the connector reports after a step.

    Attributes:
        host: Soft prompts in the workers' host memory.
        num_loads: Requests whose soft prompt was copied into blocks, in whole or in part, since the engine's start.
        num_hits: Requests whose soft prompt was in blocks already, since the engine's start.
        started: Ids of requests that were given blocks since the last report.
        steps: Steps since the last report.
    """

    host: EngineTierStats
    num_loads: int
    num_hits: int
    started: list[str]
    steps: list[StepStats]


@dataclass(slots=True)
class _Tracked:
    use: Use
    holds: bool = False
    ticket: int | None = None
    is_saved: bool = False
    has_started: bool = False

    @property
    def identity(self) -> str | None:
        return None if self.use.source is None else self.use.source.identity


class SchedulerSide:
    """Answers the scheduler's hooks. No hook raises for anything that a request contains.

    Args:
        num_workers: Workers of all ranks.
        budget_bytes: Host memory of unused soft prompts, over all workers.
        block_sizes: Positions of a block, by cache group.
    """

    def __init__(self, *, num_workers: int, budget_bytes: int, block_sizes: Sequence[int]) -> None:
        self.residency = Residency(num_workers, budget_bytes)
        self._block_sizes = tuple(block_sizes)
        self._requests: dict[str, _Tracked] = {}
        self._computing: dict[str, _Tracked] = {}
        self._commands = Commands()
        self._num_loads = self._num_hits = 0
        self._started: list[str] = []
        self._running: deque[tuple[float, int, int, int, int]] = deque(maxlen=MAX_PENDING_STEPS)
        self._steps: deque[StepStats] = deque(maxlen=MAX_PENDING_STEPS)

    def new_request(self, request: Request) -> None:
        """A request has arrived: refer to its soft prompt, and start to read it."""
        use = use_of(request.kv_transfer_params)
        if use is None:
            return
        tracked = self._requests[request.request_id] = _Tracked(use)
        if use.source is None:
            return
        if use.role is Role.LOAD:
            tracked.holds = self.residency.use(use.source)
        elif use.role is Role.COMPUTE:
            tracked.ticket = self.residency.begin_computing(use.source.identity)
            if tracked.ticket is not None:
                self._computing[request.request_id] = tracked
        elif use.role is Role.PIN:
            self.residency.pin(use.source)
        elif use.role is Role.UNPIN:
            self.residency.unpin(use.source.identity)
        elif use.role is Role.DISCARD:
            self.residency.discard(use.source.identity)

    def num_external_tokens(self, request: Request, num_computed: int) -> tuple[int | None, bool]:
        """How many tokens after the computed ones are loaded, and whether the request waits for them.

        None means: ask again in the next step. A soft prompt that cannot be loaded is answered as one to wait for,
        because only a waiting request can be failed alone.
        """
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.use.role is not Role.LOAD or tracked.use.source is None:
            return 0, False
        remaining = tracked.use.source.num_virtual_tokens - num_computed
        if remaining <= 0:
            return 0, False
        state = self.residency.state(tracked.use.source.identity) if tracked.holds else State.ABSENT
        if state is State.LOADING:
            return None, False
        return remaining, state is not State.RESIDENT

    def allocated(self, request: Request, block_ids: BlockIds, num_external: int) -> None:
        """A request was given blocks, the first ``num_external`` tokens of which are to be loaded."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        if not tracked.has_started:
            tracked.has_started = True
            self._started.append(tracked.use.request_id)
            self._num_hits += tracked.use.role is Role.LOAD and num_external <= 0
        source = tracked.use.source
        if num_external <= 0 or source is None:
            return
        if not tracked.holds or self.residency.state(source.identity) is not State.RESIDENT:
            self._commands.failed.append(request.request_id)
            return
        stop = source.num_virtual_tokens
        blocks = self._blocks(block_ids, stop)
        self._commands.loads.append(Load(self.residency.ticket(source.identity), stop - num_external, stop, blocks))
        self._num_loads += 1

    def finished(self, request_id: str) -> None:
        """A request has ended, in whatever way."""
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return
        self._computing.pop(request_id, None)
        if tracked.holds and tracked.identity is not None:
            self.residency.release(tracked.identity)
        if tracked.ticket is not None and not tracked.is_saved:
            self.residency.abandon(tracked.ticket)

    def take_commands(self, scheduler_output: Any, block_ids_of: Callable[[str], BlockIds]) -> Commands:
        """What the workers do in a step.

        Args:
            scheduler_output: vLLM's plan of the step.
            block_ids_of: The current blocks of a request.
        """
        commands, self._commands = self._commands, Commands()
        commands.reads, commands.drops = self.residency.take_commands()
        scheduled = scheduler_output.num_scheduled_tokens
        if self._computing:
            for request_id, num_computed in _computed(scheduler_output):
                tracked = self._computing.get(request_id)
                if tracked is None or tracked.ticket is None or tracked.use.source is None:
                    continue
                stop = tracked.use.source.num_virtual_tokens
                if num_computed + scheduled.get(request_id, 0) >= stop:
                    commands.saves.append(Save(tracked.ticket, self._blocks(block_ids_of(request_id), stop)))
                    tracked.is_saved = True
                    del self._computing[request_id]
        if scheduled:
            known = [tracked for request_id in scheduled if (tracked := self._requests.get(request_id))]
            distinct = len({tracked.identity for tracked in known} - {None})
            adapters = len({tracked.use.adapter for tracked in known} - {None})
            self._running.append((time.perf_counter(), len(scheduled), sum(scheduled.values()), distinct, adapters))
        return commands

    def report(self, reported: Reported) -> None:
        """Take over what the workers did in a step."""
        self.residency.report(reported)

    def take_stats(self) -> ConnectorStats:
        """The state after a step."""
        if self._running:
            began, *counts = self._running.popleft()
            self._steps.append(StepStats(time.perf_counter() - began, *counts))
        stats = ConnectorStats(
            self.residency.stats, self._num_loads, self._num_hits, self._started, list(self._steps)
        )
        self._started = []
        self._steps.clear()
        return stats

    def _blocks(self, block_ids: BlockIds, stop: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(ids[: -(-stop // size)]) for ids, size in zip(block_ids, self._block_sizes, strict=True))


def _computed(scheduler_output: Any) -> list[tuple[str, int]]:
    """The scheduled requests, each with the tokens computed before this step."""
    pairs = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
    cached = scheduler_output.scheduled_cached_reqs
    return pairs + list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
