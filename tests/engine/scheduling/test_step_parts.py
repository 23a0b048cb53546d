"""Failing steps: the sequences at fault end, and the tokens of all others do not change.

A recording runner replaces the model: each slot of each block holds a value that represents its keys and values, and
the next token depends on the slots that are read. So a slot that was not written, was written by another sequence, or
was left by a failed pass shows as a wrong token. A failed pass leaves garbage in all slots that it should write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.messages import Pin
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.types import (
    ErrorCode,
    GenerateRequest,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    StepOutput,
    TokenEvent,
)
from tests.support.engine.harness import VOCABULARY, Family, failure_of

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
            others=tuple(others),
            salt=str(self.tenant),
        )


@dataclass
class RecordingRunner:
    """Computes tokens from the slots that it reads, and raises if a sequence or a soft prompt is bad."""

    block_size: int
    fails_from: dict[str, int]
    bad_run: str | None = None
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    num_raised: int = 0

    def run(self, plan: StepPlan, _soft_prompts: object) -> StepOutput:
        if self._is_bad(plan):
            self.num_raised += 1
            self._fill_with_rubbish(plan)
            raise ValueError("bad row")
        for run in plan.key_value_fills:
            for position in range(run.source.num_virtual_tokens):
                self._write(run.blocks, position, hash((run.key, position)))
        for source, destination in plan.block_copies:
            for offset in range(self.block_size):
                self.slots[destination, offset] = self.slots.get((source, offset), -7)
        ends: list[tuple[Sequence, int]] = []
        for chunk in plan.chunks:
            value = self._compute(chunk)
            if chunk.seq is not None and chunk.samples:
                ends.append((chunk.seq, value))
        tokens = []
        for index, (seq, _) in enumerate(ends):
            if not seq.is_follower:
                values = tuple(value for _, value in ends[index : index + len(seq.members)])
                draw = 0.0 if seq.request.params.is_greedy else seq.draw()
                tokens.append(hash((values, draw)) % VOCABULARY)
        return StepOutput(tokens)

    def _is_bad(self, plan: StepPlan) -> bool:
        runs = [*plan.key_value_fills, *(chunk.run for chunk in plan.chunks if chunk.run is not None)]
        if any(run.key == self.bad_run for run in runs):
            return True
        return any(
            chunk.seq is not None
            and chunk.stop
            > chunk.seq.num_virtual_tokens + self.fails_from.get(chunk.seq.request_id.partition("/")[0], 10**9)
            for chunk in plan.chunks
        )

    def _fill_with_rubbish(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            if chunk.seq is not None and chunk.samples and not chunk.seq.is_follower:
                chunk.seq.draw()
        for run in plan.key_value_fills:
            for position in range(run.source.num_virtual_tokens):
                self._write(run.blocks, position, -1)
        for _, destination in plan.block_copies:
            for offset in range(self.block_size):
                self.slots[destination, offset] = -2
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.stop):
                self._write(chunk.block_table, position, -3)

    def _compute(self, chunk: Chunk) -> int:
        value = self._read(chunk.block_table, chunk.start - 1) if chunk.start else 0
        for position in range(chunk.start, chunk.stop):
            source = chunk.soft_prompt
            if source is not None and position < source.num_virtual_tokens:
                value = hash((value, source.identity, position))
            elif chunk.seq is not None:
                value = hash((value, chunk.seq.token_ids[position - chunk.seq.num_virtual_tokens]))
            self._write(chunk.block_table, position, value)
        return value

    def _read(self, table: list[int], position: int) -> int:
        return self.slots.get((table[position // self.block_size], position % self.block_size), -9)

    def _write(self, table: list[int], position: int, value: int) -> None:
        self.slots[table[position // self.block_size], position % self.block_size] = value


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
    engine.runner.run = runner.run  # type: ignore[method-assign,assignment]
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
