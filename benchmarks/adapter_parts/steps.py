"""Steps over any mixture of soft prompts and adapters: decodes alone, and one prefill."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch

from benchmarks.ways import Way
from server.engine.llm_engine import LLMEngine
from server.engine.types import GenerateRequest, Member, SamplingParams

Request = tuple[list[int], Member]
"""Token ids of a text, and what serves it."""

_BANDWIDTH_ROUNDS = 5
_IDLE_SECONDS = 0.0005


def add_all(engine: LLMEngine, requests: Sequence[Request], max_tokens: int) -> None:
    """Submit all requests at once.

    Raises:
        RuntimeError: If the engine refuses one.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    for index, (token_ids, member) in enumerate(requests):
        refused = engine.add(
            GenerateRequest(
                request_id=str(index),
                prompt_token_ids=token_ids,
                params=params,
                soft_prompt=member.soft_prompt,
                adapter=member.adapter,
            )
        )
        if refused:
            raise RuntimeError(refused[0].failure)


def step(engine: LLMEngine, counts: Counter[str]) -> int:
    """Compute one step; returns the number of new tokens, which are counted by request.

    If all sequences wait for a file, the thread that reads it gets a moment, as in the engine's process, whose loop
    sleeps then.

    Raises:
        RuntimeError: If a request failed.
    """
    if not engine.has_work:
        time.sleep(_IDLE_SECONDS)
    new = 0
    for event in engine.step():
        if event.failure is not None:
            raise RuntimeError(event.failure)
        counts[event.request_id] += len(event.token_ids)
        new += len(event.token_ids)
    return new


def decodes_way(engine: LLMEngine, requests: Sequence[Request], steps: int, longest: int) -> Way:
    """Decode steps of all requests together, which have started when this returns and go on from call to call.

    Short turns of engines that all keep running meet the same load of the machine; the texts, which take most of a
    round's time, are computed once. What the requests name is read before, so that all start together.

    Args:
        engine: An engine of this way alone.
        requests: What it computes.
        steps: Steps of each call.
        longest: New tokens of a request, over all calls.
    """
    counts: Counter[str] = Counter()
    run_way(engine, requests, 1)()
    add_all(engine, requests, longest)
    while len(counts) < len(requests):
        step(engine, counts)

    def way() -> tuple[int, float]:
        started = time.perf_counter()
        tokens = sum(step(engine, counts) for _ in range(steps))
        seconds = time.perf_counter() - started
        if tokens != steps * len(requests):
            raise RuntimeError(f"{tokens} tokens in {steps} steps of {len(requests)} requests")
        return tokens, seconds

    return way


def run_way(engine: LLMEngine, requests: Sequence[Request], new_tokens: int) -> Way:
    """All requests from arrival to end; counts the tokens of the texts too if each gets one new token."""
    rows = sum(len(token_ids) for token_ids, _ in requests) if new_tokens == 1 else 0

    def way() -> tuple[int, float]:
        counts: Counter[str] = Counter()
        started = time.perf_counter()
        add_all(engine, requests, new_tokens)
        while engine.num_unfinished:
            step(engine, counts)
        return rows or counts.total(), time.perf_counter() - started

    return way


def reading_seconds(nbytes: int) -> float:
    """Time to read that many bytes from memory once, with all threads: the shortest of some rounds."""
    data = torch.ones(max(1, nbytes // 4), dtype=torch.int32)
    best = float("inf")
    for _ in range(_BANDWIDTH_ROUNDS):
        started = time.perf_counter()
        data.sum(dtype=torch.int32)
        best = min(best, time.perf_counter() - started)
    return best
