"""The engine as the API sees it: narrow enough for a fake in tests, or another engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol
from uuid import uuid4

from server.engine.messages import AdapterInspection, BatchPicture
from server.engine.stats import EngineStats
from server.engine.types import (
    MAX_PRIORITY,
    AdapterSource,
    FinishReason,
    GenerateRequest,
    Inspection,
    Member,
    ModelInfo,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)
from server.errors import EngineNotReadyError

PROBE_PREFIX = "probe-"
"""How the request ids of probes begin."""


class Engine(Protocol):
    """What the API needs of an engine."""

    @property
    def model(self) -> ModelInfo:
        """The resident model.

        Raises:
            EngineNotReadyError: If it is not loaded yet.
        """
        ...

    @property
    def is_ready(self) -> bool:
        """Whether the engine accepts requests: loaded, alive, not draining."""
        ...

    @property
    def outage(self) -> str | None:
        """Why the engine is being restarted; None if it is not."""
        ...

    @property
    def since(self) -> float:
        """Unix time in seconds at which the engine became ready, or its outage began; 0 before it was first ready."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its newest step. Counters keep counting across restarts."""
        ...

    @property
    def exposition(self) -> str:
        """Metrics that the engine has beside ``stats``, in Prometheus' text format; empty if there are none."""
        ...

    async def look(self) -> BatchPicture:
        """The running batch, at most a fifth of a second and one step ago. Costs nothing while it is not called.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining, or does not answer.
            UnsupportedByEngineError: If the engine does not know its batch.
        """
        ...

    def subscribe(self, on_restarted: Callable[[], None]) -> None:
        """Call a function on the event loop after each restart, before the engine accepts another request.

        Pins have been restored by then; the contents of the device have not.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Continue one text. Closing the generator early, or cancelling it, aborts the sequence.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends before the last event.
            WaitTimeoutError: If the request did not start to run within its timeout.
            ConstraintError: If the constraint cannot be used or satisfied.
            RequestRefusedError: If the engine can never serve this request.
            UnsupportedByEngineError: If the engine lacks a capability that the request needs (``ModelInfo``).
            RequestFailedError: If the engine failed on this request; NotFiniteError if the model computed NaN or
                infinity.
        """
        ...

    async def prepare(self, soft_prompt: SoftPromptSource | None, adapter: AdapterSource | None = None) -> None:
        """Load a soft prompt, an adapter, or a pair of them onto the device before the first request.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends meanwhile.
            UnsupportedByEngineError: If the engine lacks a capability that they need.
            RequestFailedError: If they cannot be loaded.
        """
        ...

    def pin(self, source: SoftPromptSource | AdapterSource) -> None:
        """Keep a soft prompt's rows, or an adapter, in the engine's host memory; its files must stay until ``unpin``.

        There is no reply: only ``prepare`` reports whether it can be loaded.
        """
        ...

    def unpin(self, source: SoftPromptSource | AdapterSource) -> None:
        """End a pin, if there is one."""
        ...

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        """Compare a soft prompt with the model: norms, and the vocabulary tokens nearest to each virtual token.

        Args:
            soft_prompt: The soft prompt; its file must stay until this returns.
            num_nearest: Vocabulary tokens to find for each virtual token, at least 1.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends meanwhile.
            UnsupportedByEngineError: If the engine does not inspect.
            OverloadedError: If too many inspections are waiting.
            RequestFailedError: If the soft prompt cannot be read.
        """
        ...

    async def inspect_adapter(self, adapter: AdapterSource) -> AdapterInspection:
        """Measure what an adapter changes in each module of the model.

        Args:
            adapter: The adapter; its files must stay until this returns.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends meanwhile.
            UnsupportedByEngineError: If the engine does not inspect, or serves no adapters.
            OverloadedError: If too many inspections are waiting.
            RequestFailedError: If the adapter cannot be read.
        """
        ...

    async def start(self) -> None:
        """Start the engine and wait until it is ready. From then on, it is restarted when it dies.

        Raises:
            EngineStartError: If it cannot start.
        """
        ...

    async def drain(self, timeout_seconds: float) -> None:
        """Accept no new requests, wait for those in flight, and abort the rest after the timeout."""
        ...

    async def stop(self) -> None:
        """End the engine; requests still in flight fail with EngineDeadError."""
        ...


async def probe_member(
    engine: Engine,
    member: Member,
    token_ids: list[int],
    *,
    max_tokens: int,
    salt: str = "",
    max_wait: float | None = None,
) -> None:
    """Check that the model can compute with a soft prompt, an adapter or both: continue a text, behind all requests.

    Args:
        engine: Where.
        member: What to try; its files have to stay until this returns.
        token_ids: At least one text token.
        max_tokens: Maximum number of new tokens; none are computed if there is a classification head.
        salt: The tenant, as in ``GenerateRequest``.
        max_wait: Seconds in which the request has to start; None is no limit.

    Raises:
        NotFiniteError: If a hidden state, a key or value, or a logit is NaN or infinite.
        EngineError: As ``Engine.generate`` does; EngineNotReadyError also if the server shuts down meanwhile.
    """
    has_head = any(source.num_labels is not None for source in (member.soft_prompt, member.adapter) if source)
    request = GenerateRequest(
        request_id=f"{PROBE_PREFIX}{uuid4().hex}",
        prompt_token_ids=token_ids,
        params=SamplingParams(
            max_tokens=0 if has_head else max_tokens, temperature=0.0, ignore_eos=True, classify=has_head
        ),
        soft_prompt=member.soft_prompt,
        adapter=member.adapter,
        salt=salt,
        priority=MAX_PRIORITY,
        timeout=max_wait,
    )
    async for event in engine.generate(request):
        if event.finish_reason is FinishReason.ABORT:
            raise EngineNotReadyError("the server is shutting down")
