"""Time to the first token of a long text, alone and beside running decodes, and what it costs the decodes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.peers.token_times import TokenTimes, measure_token_times
from benchmarks.peers.vllm_process import VllmProcess
from benchmarks.workload import make_texts
from server.engine.llm_engine import LLMEngine
from server.engine.types import AdapterSource, GenerateRequest, SamplingParams, SoftPromptSource

DECODE_TEXT = 64
"""Number of text tokens of each running decode."""

DECODE_TOKENS = 1024
"""Maximum number of new tokens of each running decode."""


@dataclass(frozen=True)
class Stream:
    """Texts that arrive one after another beside decodes.

    Attributes:
        length: Tokens of each text.
        texts: Number of texts.
        decodes: Number of running decodes.
        steps_between: Number of steps between a text's token and the next text.
        limits: Values of ``max_num_batched_tokens`` to compare with the engine's own.
    """

    length: int
    texts: int
    decodes: int
    steps_between: int
    limits: Sequence[int] = ()


class EngineStepper:
    """Our engine, as ``measure_token_times`` drives it.

    Args:
        engine: An engine without work.
        sources: Soft prompts that the requests use in turn; empty for none.
        adapters: Adapters that the requests use in turn; empty for none.
    """

    def __init__(
        self, engine: LLMEngine, sources: Sequence[SoftPromptSource], adapters: Sequence[AdapterSource] = ()
    ) -> None:
        self._engine, self._sources, self._adapters = engine, sources, adapters
        self._num_requests = 0

    def add(self, request_id: str, token_ids: list[int], max_tokens: int) -> None:
        """Add a request that ends after ``max_tokens`` tokens."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        source = self._sources[self._num_requests % len(self._sources)] if self._sources else None
        adapter = self._adapters[self._num_requests % len(self._adapters)] if self._adapters else None
        self._num_requests += 1
        refused = self._engine.add(
            GenerateRequest(
                request_id=request_id,
                prompt_token_ids=token_ids,
                params=params,
                soft_prompt=source,
                adapter=adapter,
            )
        )
        if refused:
            raise RuntimeError(refused[0].failure)

    def step(self) -> list[str]:
        """Compute one step; returns the ids of the requests that got a token.

        Raises:
            RuntimeError: If a request failed.
        """
        events = self._engine.step()
        for event in events:
            if event.failure is not None:
                raise RuntimeError(event.failure)
        return [event.request_id for event in events if event.token_ids]

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._engine.abort(request_id)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is at least as large as ``percent`` percent of all values."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def summary(alone: TokenTimes, beside: TokenTimes) -> dict[str, float]:
    """Figures of one round in milliseconds."""
    seconds = {
        "first token alone": statistics.median(alone.first_token),
        "first token beside decodes": statistics.median(beside.first_token),
        "gap without texts": statistics.median(beside.quiet_gaps),
        "gap": statistics.median(beside.gaps),
        "gap p99": percentile(beside.gaps, 99),
        "longest gap": max(beside.gaps),
    }
    return {name: 1000 * value for name, value in seconds.items()}


def compare(
    engine: LLMEngine, sources: Sequence[SoftPromptSource], vllm: VllmProcess | None, stream: Stream, rounds: int
) -> dict[str, object]:
    """Run the engines in turn; returns medians over the rounds, in milliseconds, and ratios of times.

    Args:
        engine: Our engine, without prefix caching.
        sources: Soft prompts that the requests use in turn.
        vllm: vLLM, started with ``steps_on_call``; its texts are longer by the number of virtual tokens.
        stream: The texts and the decodes.
        rounds: Number of rounds after the warm-up.
    """
    texts = _token_ids(stream.texts, stream.length)
    decodes = _token_ids(stream.decodes, DECODE_TEXT)

    default = engine.scheduler.max_num_batched_tokens

    def ours(used: Sequence[SoftPromptSource], limit: int = default) -> dict[str, float]:
        engine.scheduler.max_num_batched_tokens = limit
        try:
            return _both(
                lambda running: measure_token_times(
                    EngineStepper(engine, used),
                    texts,
                    running,
                    steps_between=stream.steps_between,
                    decode_tokens=DECODE_TOKENS,
                ),
                decodes,
            )
        finally:
            engine.scheduler.max_num_batched_tokens = default

    runs: dict[str, Callable[[], dict[str, float]]] = {
        "soft prompts": lambda: ours(sources),
        "no prompts": lambda: ours([]),
        **{f"limit {limit}": partial(ours, sources, limit) for limit in stream.limits},
    }
    if vllm is not None:
        peer, virtual = vllm, [1] * sources[0].num_virtual_tokens
        longer = [virtual + text for text in texts]
        runs["vllm"] = lambda: _both(
            lambda running: peer.token_times(
                longer, running, steps_between=stream.steps_between, decode_tokens=DECODE_TOKENS
            ),
            [virtual + text for text in decodes],
        )
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            figures = run()
            if number:  # round 0 is the warm-up
                results[name].append(figures)
            shown = ", ".join(f"{what} {value:.1f}" for what, value in figures.items())
            print(f"round {number}  {name:12s} {shown} ms", flush=True)
    return {
        "milliseconds": {
            name: {what: round(statistics.median(one[what] for one in several), 2) for what in several[0]}
            for name, several in results.items()
        },
        "ratios": {
            f"soft prompts over {name}": {
                what: round(
                    statistics.median(
                        one[what] / other[what] for one, other in zip(results["soft prompts"], several, strict=True)
                    ),
                    3,
                )
                for what in several[0]
            }
            for name, several in results.items()
            if name != "soft prompts"
        },
    }


def _both(measured: Callable[[list[list[int]]], TokenTimes], decodes: list[list[int]]) -> dict[str, float]:
    return summary(measured([]), measured(decodes))


def _token_ids(count: int, length: int) -> list[list[int]]:
    return [text.token_ids for text in make_texts(count, num_prompts=1, shortest=length, longest=length)]
