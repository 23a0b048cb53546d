"""The engine as the API sees it: narrow enough for a fake in tests, or another engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol
from uuid import uuid4

from server.engine.types import (
    MAX_PRIORITY,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Inspection,
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
    def stats(self) -> EngineStats:
        """The engine's state after its newest step. Counters keep counting across restarts."""
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

    async def prepare(self, soft_prompt: SoftPromptSource) -> None:
        """Load a soft prompt onto the device before its first request.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends meanwhile.
            RequestFailedError: If the soft prompt cannot be loaded.
        """
        ...

    def pin(self, soft_prompt: SoftPromptSource) -> None:
        """Keep a soft prompt's rows in the engine's host memory; its file must stay until ``unpin``.

        There is no reply: only ``prepare`` reports whether the soft prompt can be loaded.
        """
        ...

    def unpin(self, soft_prompt: SoftPromptSource) -> None:
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


async def probe_soft_prompt(
    engine: Engine,
    soft_prompt: SoftPromptSource,
    token_ids: list[int],
    *,
    max_tokens: int,
    salt: str = "",
    max_wait: float | None = None,
) -> None:
    """Check that the model can compute with a soft prompt: continue a short text, behind all other requests.

    Args:
        engine: Where.
        soft_prompt: The soft prompt; its file has to stay until this returns.
        token_ids: At least one text token.
        max_tokens: Maximum number of new tokens; none are computed if the soft prompt has a classification head.
        salt: The tenant, as in ``GenerateRequest``.
        max_wait: Seconds in which the request has to start; None is no limit.

    Raises:
        NotFiniteError: If a hidden state, a key or value, or a logit is NaN or infinite.
        EngineError: As ``Engine.generate`` does; EngineNotReadyError also if the server shuts down meanwhile.
    """
    has_head = soft_prompt.num_labels is not None
    request = GenerateRequest(
        request_id=f"{PROBE_PREFIX}{uuid4().hex}",
        prompt_token_ids=token_ids,
        params=SamplingParams(
            max_tokens=0 if has_head else max_tokens, temperature=0.0, ignore_eos=True, classify=has_head
        ),
        soft_prompt=soft_prompt,
        salt=salt,
        priority=MAX_PRIORITY,
        timeout=max_wait,
    )
    async for event in engine.generate(request):
        if event.finish_reason is FinishReason.ABORT:
            raise EngineNotReadyError("the server is shutting down")
