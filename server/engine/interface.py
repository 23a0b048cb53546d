"""The engine as the API sees it: narrow enough that a test hands in a fake, or another engine stands behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

from server.engine.types import (
    MAX_PRIORITY,
    EngineStats,
    FinishReason,
    Inspection,
    Logprobs,
    ModelInfo,
    SamplingParams,
    SoftPromptSource,
)
from server.errors import EngineNotReadyError

PROBE_PREFIX = "probe-"
"""How the request ids of probes begin."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One text to continue.

    Attributes:
        request_id: Unique among the requests in flight.
        prompt_token_ids: At least one text token.
        params: How to sample.
        soft_prompt: What stands before the text, or None.
        others: The same for the other members of an ensemble: each token is drawn from the mean of the distributions
            that the model has behind each of the soft prompts.
        salt: The tenant: its cached texts are its own, and it takes turns with the others.
        priority: -100 to 100; lower is more urgent.
        timeout: Seconds in which it has to begin to run, or it fails; None is no limit.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    soft_prompt: SoftPromptSource | None = None
    others: tuple[SoftPromptSource | None, ...] = ()
    salt: str = ""
    priority: int = 0
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request; the last event, and only that, has a finish reason.

    Attributes:
        token_ids: New tokens since the last event; empty only where the request ended without one.
        finish_reason: ``stop``, ``length`` or ``abort`` at the end, else None.
        stop_token_id: The token that ended the text, if one did; it is the last of ``token_ids``.
        num_cached_tokens: Text tokens that cached prefixes saved, of all members of an ensemble.
        queue_seconds: From its arrival to its first blocks; in the first event only.
        prefill_seconds: From then to its first token; in the first event only.
        logprobs: One for each of ``token_ids``, where they were asked for.
        prompt_logprobs: One for each of the text's tokens, in the first event, where they were asked for; the first
            may be None. They begin at ``SamplingParams.prompt_logprobs_start``.
        class_logits: What the soft prompt's head gives each label, in the first event, where it was asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_token_id: int | None
    num_cached_tokens: int
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    class_logits: list[float] | None = None


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
        """Whether requests are taken: loaded, alive, not draining."""
        ...

    @property
    def outage(self) -> str | None:
        """Why the engine is being restarted; None while it is not."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's state after its newest step; a restart does not take its counters back."""
        ...

    def subscribe(self, on_restarted: Callable[[], None]) -> None:
        """Call something on the event loop after each restart, before another request is taken.

        Pins have been made again by then; what was on the device has not.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Continue one text. Closing the generator early (or cancelling it) aborts the sequence.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends before the last event.
            WaitTimeoutError: If it did not begin to run within its timeout.
            ConstraintError: If its constraint cannot be used or satisfied, with the reason.
            RequestRefusedError: If it asks for what the engine can never do, with the reason.
            RequestFailedError: If the engine could not finish this request, with the reason; NotFiniteError where
                the model computed NaN or an infinity for it.
        """
        ...

    async def prepare(self, soft_prompt: SoftPromptSource) -> None:
        """Bring a soft prompt onto the device before its first request.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends meanwhile.
            RequestFailedError: If the soft prompt cannot be loaded.
        """
        ...

    def pin(self, soft_prompt: SoftPromptSource) -> None:
        """Keep a soft prompt's rows in the engine's host memory; its file has to stay until ``unpin``.

        A wish, with no answer: ``prepare`` tells whether the soft prompt can be loaded.
        """
        ...

    def unpin(self, soft_prompt: SoftPromptSource) -> None:
        """End a pin; nothing happens where there is none."""
        ...

    async def inspect(self, soft_prompt: SoftPromptSource, *, num_nearest: int) -> Inspection:
        """Compare a soft prompt with the model: norms, and the vocabulary tokens nearest to each virtual one.

        Args:
            soft_prompt: What to look at; its file has to stay until this returns.
            num_nearest: Vocabulary tokens to find for each virtual token, at least 1.

        Raises:
            EngineNotReadyError: If the engine is loading, restarting or draining.
            EngineDeadError: If the engine process ends meanwhile.
            OverloadedError: If too many inspections wait already.
            RequestFailedError: If the soft prompt cannot be read, with the reason.
        """
        ...

    async def start(self) -> None:
        """Start the engine and wait until it is ready; from then on it restarts by itself when it dies.

        Raises:
            EngineStartError: If it cannot start.
        """
        ...

    async def drain(self, timeout_seconds: float) -> None:
        """Take no new requests, wait for those in flight, abort what is left after the timeout."""
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
