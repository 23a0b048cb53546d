"""Times of tokens while texts arrive beside running decodes; the same code drives every engine.

Imports the standard library only, because it also runs in vLLM's environment.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

QUIET_STEPS = 16
"""Number of decode steps before the first text."""


class Stepper(Protocol):
    """An engine that computes a step only when it is called."""

    def add(self, request_id: str, token_ids: list[int], max_tokens: int) -> None:
        """Add a request that ends after ``max_tokens`` tokens."""

    def step(self) -> list[str]:
        """Compute one step; returns the ids of the requests that got a token."""

    def abort(self, request_id: str) -> None:
        """End a request."""


@dataclass(frozen=True)
class TokenTimes:
    """Durations in seconds.

    Attributes:
        first_token: From adding a text to its token, one value per text.
        gaps: Between consecutive tokens of each running decode, from the first text on.
        quiet_gaps: The same before the first text.
    """

    first_token: list[float]
    gaps: list[float]
    quiet_gaps: list[float]


def measure_token_times(
    stepper: Stepper,
    texts: Sequence[list[int]],
    decodes: Sequence[list[int]],
    *,
    steps_between: int,
    decode_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> TokenTimes:
    """Add the texts one after another beside running decodes.

    Args:
        stepper: An engine without work.
        texts: Token ids of the texts. Each one gets one token.
        decodes: Token ids of the requests that decode meanwhile; empty to measure the texts alone.
        steps_between: Number of steps between a text's token and the next text.
        decode_tokens: Maximum number of tokens of each decode.
        clock: Returns the time in seconds.

    Raises:
        RuntimeError: If a decode ended before the last text had its token.
    """
    running = [f"decode{index}" for index in range(len(decodes))]
    for request_id, token_ids in zip(running, decodes, strict=True):
        stepper.add(request_id, token_ids, decode_tokens)
    last: dict[str, float] = {}
    counts: Counter[str] = Counter()

    def step(gaps: list[float]) -> list[str]:
        received = stepper.step()
        now = clock()
        for request_id in received:
            if request_id in last:
                gaps.append(now - last[request_id])
            last[request_id] = now
        counts.update(received)
        return received

    while not all(request_id in last for request_id in running):
        step([])
    times = TokenTimes([], [], [])
    for _ in range(QUIET_STEPS if decodes else 0):
        step(times.quiet_gaps)
    for index, token_ids in enumerate(texts):
        request_id = f"text{index}"
        started = clock()
        stepper.add(request_id, token_ids, 1)
        while request_id not in step(times.gaps):
            pass
        times.first_token.append(last[request_id] - started)
        for _ in range(steps_between if decodes else 0):
            step(times.gaps)
    if any(counts[request_id] >= decode_tokens for request_id in running):
        raise RuntimeError(f"{decode_tokens} tokens per decode are too few for this number of texts and steps")
    for request_id in running:
        stepper.abort(request_id)
    return times
