"""Soft prompts are copied into their blocks in pieces, through pinned memory, in the right order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.attention.kv_cache import KVCache
from server.engine.model import block_loads
from server.engine.model.block_loads import BlockLoads
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.plan import StepPlan
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.soft_prompt_run import SoftPromptRun
from server.engine.types import SamplingParams, SoftPromptSource
from tests.support.engine.caches import make_cache
from tests.support.engine.lazy_stream import LazyStream
from tests.support.engine.sequences import make_sequence
from tests.support.waiting import wait_until

WIDTH = 64
"""Numbers of a token in the caches of ``make_cache``."""


class Bench:
    """Loads into a cache of 40 blocks of 4 positions, with a scheduler that plans them.

    Args:
        tokens_per_piece: Size of the pieces.
        stream: The copy stream.
    """

    def __init__(self, tokens_per_piece: int, stream: LazyStream | None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_loads, "PIECE_BYTES", tokens_per_piece * WIDTH * 4)
            patch.setattr(block_loads, "STEP_FILL_BYTES", 0)
            self.cache = make_cache()
            self.num_woken = 0
            self.loads = BlockLoads(self.cache, stream, self._wake)
        self.scheduler = Scheduler(
            BlockManager(40, 4),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=160,
            step_fill_tokens=self.loads.step_fill_tokens,
        )
        self.rows: dict[str, torch.Tensor] = {}

    def _wake(self) -> None:
        self.num_woken += 1

    def add(self, name: str, num_tokens: int, digest: str = "") -> Sequence:
        source = SoftPromptSource(
            digest=digest or name, num_virtual_tokens=num_tokens, is_key_values=True, path="/nowhere"
        )
        seq = make_sequence(name, [1, 2, 3], SamplingParams(max_tokens=4), source)
        self.rows.setdefault(source.identity, torch.randn(num_tokens, WIDTH))
        self.scheduler.add(seq)
        return seq

    def start(self) -> StepPlan:
        plan = self.scheduler.schedule(0.0)
        loader = Mock(spec=SoftPromptLoader, rows=lambda source: self.rows[source.identity])
        self.loads.start(plan, loader)
        self.scheduler.check_integrity()
        return plan

    def end(self) -> list[tuple[list[Sequence], BaseException]]:
        """Wait for all loads, and take them."""
        failed: list[tuple[list[Sequence], BaseException]] = []

        def have_ended() -> bool:
            failed.extend(self.loads.end(self.scheduler))
            return len(self.loads) == 0

        wait_until(have_ended, 10)
        return failed

    def run_of(self, name: str) -> SoftPromptRun:
        return self.scheduler.block_manager.runs[name]

    def holds(self, name: str) -> bool:
        """Whether the blocks of a soft prompt hold its keys and values."""
        rows = self.rows[name]
        other = make_cache()
        other.fill(self.run_of(name).blocks, rows)
        slots = self.cache.slots(self.run_of(name).blocks)[: len(rows)]
        return all(
            torch.equal(own[slots], want[slots])
            for own, want in zip(self.cache.layer(0), other.layer(0), strict=True)
        )


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(tokens_per_piece: int, stream: LazyStream | None) -> Bench:
        made.append(Bench(tokens_per_piece, stream))
        return made[-1]

    yield make
    for bench in made:
        bench.loads.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_copies_that_run_late_write_the_right_rows(tokens_per_piece: int, sizes: list[int]) -> None:
    bench = Bench(tokens_per_piece, LazyStream())
    before = bench.cache.tensor.clone()
    for index, size in enumerate(sizes):
        bench.add(str(index), size)
    bench.start()
    assert bench.end() == []
    bench.loads.close()
    assert all(bench.run_of(str(index)).is_filled and bench.holds(str(index)) for index in range(len(sizes)))
    written = [block for index in range(len(sizes)) for block in bench.run_of(str(index)).blocks]
    others = [block for block in range(41) if block not in written]
    assert torch.equal(bench.cache.tensor[:, :, others], before[:, :, others])
    assert bench.num_woken == len(sizes)


def test_without_marks_late_copies_read_the_wrong_piece(make_bench: Callable[..., Bench]) -> None:
    """The test above can fail."""
    stream = LazyStream(ignores_marks=True)
    bench = make_bench(4, stream)
    bench.add("a", 20)
    bench.start()
    bench.end()
    stream.run()
    assert not bench.holds("a")


def test_copies_wait_for_the_steps_before_them(make_bench: Callable[..., Bench]) -> None:
    stream = LazyStream()
    bench = make_bench(8, stream)
    bench.add("a", 20)
    bench.start()
    bench.end()
    assert stream.notes == ["mark behind the steps", "wait for the steps", *["copy"] * 6]


def test_sequences_that_wait_for_one_soft_prompt_share_the_load(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(4, LazyStream())
    first = bench.add("first", 18, "shared")
    assert [run.key for run in bench.start().loads] == ["shared"]
    second = bench.add("second", 18, "shared")
    assert bench.start().loads == []
    bench.end()
    plan = bench.start()
    assert [chunk.seq for chunk in plan.chunks] == [first, second]
    assert {source for source, _ in plan.block_copies} == {bench.run_of("shared").blocks[-1]}
    assert bench.holds("shared")


def test_a_load_that_no_sequence_waits_for_stops(make_bench: Callable[..., Bench]) -> None:
    stream = LazyStream()
    bench = make_bench(1, stream)
    names = ["first", "second"]
    for name in names:
        bench.add(name, 30)

    def abort() -> None:
        for name in names:
            bench.scheduler.abort(name)
        names.clear()

    stream.pause = abort  # in the thread, when the first piece is copied
    bench.start()
    blocks = bench.scheduler.block_manager
    assert bench.end() == []
    assert not blocks.runs
    assert blocks.num_available == 40
    assert stream.notes.count("copy") < 10


def test_a_load_that_was_abandoned_is_started_again_for_a_new_sequence(make_bench: Callable[..., Bench]) -> None:
    stream = LazyStream()
    bench = make_bench(1, stream)
    bench.add("first", 30, "shared")
    again: list[Sequence] = []

    def abandon() -> None:
        stream.pause = lambda: None
        bench.scheduler.abort("first")

    stream.pause = abandon
    bench.start()
    wait_until(lambda: bench.num_woken == 1, 10)  # it has stopped, but has not been taken
    again.append(bench.add("again", 30, "shared"))
    assert bench.start().loads == []
    bench.end()
    assert not bench.run_of("shared").is_filled
    assert [run.key for run in bench.start().loads] == ["shared"]
    bench.end()
    assert [chunk.seq for chunk in bench.start().chunks] == again
    assert bench.holds("shared")


@pytest.mark.parametrize("error", [RuntimeError("no such slot"), SystemExit("a panic")])
def test_a_piece_that_fails_fails_the_waiting_sequences_alone(
    error: BaseException, make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LazyStream()
    bench = make_bench(4, stream)
    waiting = [bench.add(name, 20, "broken") for name in ("a", "b")]
    other = bench.add("other", 19)
    write, calls = KVCache.write, []

    def fail_once(cache: KVCache, *arguments: Any) -> None:
        calls.append(len(stream.notes))
        if len(calls) == 3:
            raise error
        write(cache, *arguments)

    monkeypatch.setattr(KVCache, "write", fail_once)
    bench.start()
    ((failed, cause),) = bench.end()
    assert (failed, cause) == (waiting, error)
    for seq in failed:
        bench.scheduler.abort(seq.request_id)
    assert [chunk.seq for chunk in bench.start().chunks] == [other]
    assert list(bench.scheduler.block_manager.runs) == ["other"]
    monkeypatch.undo()
    assert bench.holds("other")


def test_pinned_memory_is_allocated_once_and_bounded(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(4, LazyStream())
    staged = [tensor.data_ptr() for tensor in bench.loads._staged]
    assert sum(tensor.nbytes for tensor in bench.loads._staged) == 2 * 4 * WIDTH * 4
    bench.add("a", 40)
    bench.start()
    bench.end()
    assert staged == [tensor.data_ptr() for tensor in bench.loads._staged]
    # A piece holds a token at least.
    assert len(make_bench(0, LazyStream()).loads._staged[0]) == 1


def test_closing_stops_a_load(make_bench: Callable[..., Bench]) -> None:
    stream = LazyStream()
    bench = make_bench(1, stream)
    bench.add("a", 100)
    stream.pause = bench.loads._jobs.stop
    bench.start()
    bench.loads.close()
    assert stream.notes.count("copy") < 10


def test_without_a_stream_nothing_is_loaded(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(4, None)
    assert bench.loads.step_fill_tokens is None
    bench.add("a", 40)
    plan = bench.start()
    assert (plan.loads, [run.key for run in plan.key_value_fills]) == ([], ["a"])
    plan.loads += plan.key_value_fills
    with pytest.raises(AssertionError, match="a device without a copy stream"):
        bench.loads.start(plan, Mock(spec=SoftPromptLoader))
