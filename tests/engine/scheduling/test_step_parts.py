"""Failing steps: the sequences at fault end, and the tokens of all others do not change.

A ``RecordingRunner`` replaces the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.messages import Pin
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.scheduler import Scheduler
from server.engine.types import (
    ErrorCode,
    GenerateRequest,
    Member,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    TokenEvent,
)
from tests.support.engine.harness import Family, failure_of
from tests.support.engine.recording_runner import RecordingRunner

SOFT_PROMPTS = (None, "prefix_13", "prompt_tuning_8", "p_tuning_7")


@dataclass(frozen=True)
class Request:
    """A request, with the position from which on it fails every step that it is in; None for never."""

    text: list[int]
    max_tokens: int
    prompt: int
    tenant: int
    members: int
    arrival: int
    is_greedy: bool
    fails_from: int | None

    def message(self, name: str, sources: list[SoftPromptSource | None]) -> GenerateRequest:
        source, *others = ([*sources, *sources][self.prompt + index] for index in range(self.members))
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0 if self.is_greedy else 1.0, seed=3)
        return GenerateRequest(
            request_id=name,
            prompt_token_ids=self.text,
            params=params,
            soft_prompt=source,
            others=tuple(Member(soft_prompt=one) for one in others),
            salt=str(self.tenant),
        )


@pytest.fixture(scope="module")
def engine(make_family: Callable[[str], Family]) -> Iterator[LLMEngine]:
    """One engine for all examples, with its soft prompts in memory."""
    family = make_family("llama")
    made = LLMEngine(EngineSettings(model=str(family.path), dtype="float32", kv_cache_memory=2**20))
    sources = [family.soft_prompts[name] for name in SOFT_PROMPTS if name]
    for source in sources:
        made.pin(Pin(source))
    while made.soft_prompts.stats.resident < len(sources):
        made.take_loaded()
        time.sleep(0.001)
    yield made
    made.close()


requests = st.builds(
    Request,
    # Few different openings, so that sequences share blocks, also within a step.
    text=st.builds(
        lambda opening, length, end: [opening] * length + end,
        st.integers(0, 1),
        st.integers(1, 14),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_tokens=st.integers(1, 6),
    prompt=st.integers(0, len(SOFT_PROMPTS) - 1),
    tenant=st.integers(0, 1),
    members=st.sampled_from([1, 1, 1, 2, 3]),
    arrival=st.integers(0, 5),
    is_greedy=st.booleans(),
    fails_from=st.one_of(st.none(), st.none(), st.integers(0, 18)),
)


@dataclass(frozen=True)
class Limits:
    """Small limits, so that blocks and budgets run short."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


limits = st.builds(
    Limits,
    num_blocks=st.integers(40, 70),
    block_size=st.integers(2, 16),
    max_num_seqs=st.integers(3, 8),
    max_num_batched_tokens=st.integers(8, 40),
)


def serve(
    engine: LLMEngine,
    sizes: Limits,
    arriving: dict[str, Request],
    sources: list[SoftPromptSource | None],
    **bad: Any,
) -> tuple[dict[str, list[TokenEvent]], RecordingRunner]:
    """All outputs of each request; checks the scheduler's invariants after every step."""
    runner = RecordingRunner(sizes.block_size, **bad)
    engine.runner.launch = runner.launch  # type: ignore[method-assign,assignment]
    engine.scheduler = Scheduler(
        BlockManager(sizes.num_blocks, sizes.block_size),
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=200,
    )
    outputs: dict[str, list[TokenEvent]] = {name: [] for name in arriving}
    step = 0
    while engine.num_unfinished or step <= max((one.arrival for one in arriving.values()), default=0):
        for name, request in arriving.items():
            if request.arrival == step:
                outputs[name] += engine.add(request.message(name, sources))
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
        step += 1
    assert engine.scheduler.block_manager.num_available == sizes.num_blocks
    return outputs, runner


def tokens_of(outputs: list[TokenEvent]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    arriving=st.lists(requests, min_size=1, max_size=10),
    sizes=limits,
    bad_prompt=st.sampled_from([None, None, *SOFT_PROMPTS[1:]]),
)
def test_healthy_sequences_do_not_depend_on_failing_ones(
    engine: LLMEngine, llama: Family, arriving: list[Request], sizes: Limits, bad_prompt: str | None
) -> None:
    sources = [llama.soft_prompts[name] if name else None for name in SOFT_PROMPTS]
    named = {f"r{index}": request for index, request in enumerate(arriving)}
    want, _ = serve(engine, sizes, named, sources, fails_from={})
    fails_from = {name: one.fails_from for name, one in named.items() if one.fails_from is not None}
    bad_run = llama.soft_prompts[bad_prompt].identity if bad_prompt else None
    got, runner = serve(engine, sizes, named, sources, fails_from=fails_from, bad_run=bad_run)
    num_failed = 0
    for name, request in named.items():
        last = got[name][-1]
        refusal = want[name][-1].failure
        if refusal is not None:
            assert last.failure == refusal
            assert refusal.code is ErrorCode.REFUSED
            continue
        places = [*sources, *sources][request.prompt : request.prompt + request.members]
        uses_bad_run = bad_run is not None and any(own is not None and own.identity == bad_run for own in places)
        # The last token is not fed back.
        reached = len(request.text) + request.max_tokens - 1
        is_bad = uses_bad_run or (request.fails_from is not None and request.fails_from < reached)
        assert (last.failure is not None) == is_bad
        said = tokens_of(got[name])
        assert said == tokens_of(want[name])[: len(said)]
        if is_bad:
            num_failed += 1
            assert failure_of(last) == RequestFailure(
                ErrorCode.FAILED, "the model failed to compute this request (ValueError: bad row)"
            )
        else:
            assert len(said) == request.max_tokens
    assert (runner.num_raised > 0) == (num_failed > 0)
    assert engine.num_unfinished == 0
