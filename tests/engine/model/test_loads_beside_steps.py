"""While a long prefix is loaded in pieces, every step computes the other sequences, and all tokens are PEFT's.

Over a fake of torch.cuda. The copying thread waits for a permit at each event.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType
from transformers import LlamaConfig

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

from server.engine.attention.kv_cache import KVCache
from server.engine.llm_engine import LLMEngine
from server.engine.messages import Pin
from server.engine.model import block_loads
from server.engine.types import ErrorCode, FinishReason, GenerateRequest, TokenEvent
from server.errors import DeviceError
from tests.support.engine.fake_cuda import DEFAULT_STREAM, FakeCUDA, fake_cuda_platform
from tests.support.engine.harness import (
    SHAPE,
    Family,
    add,
    failure_of,
    greedy,
    make_family,
    random_text,
    run,
    tokens,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

RNG = random.Random(8)
TEXTS = [random_text(RNG, 9, 9) for _ in range(4)]
TOKEN_BYTES = 3 * 2 * 2 * 12 * 4
LONG, PIECE = 4096, 64
NUM_WAITS = LONG // PIECE - block_loads.NUM_STAGED + 1
"""Waits of the copying thread: for pinned memory to be read, and for the end."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    def prefix(size: int) -> Callable[[], PrefixTuningConfig]:
        return lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=size)

    soft_prompts = {
        "prefix_long": prefix(LONG),
        "prefix_other": prefix(1000),
        "prefix_small": prefix(13),
        "prompt_tuning": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20),
    }
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": LONG + 256})
    return make_family("llama", tmp_path_factory.mktemp("long"), soft_prompts, config)


class Served:
    """An engine over the fake, with all soft prompts in host memory."""

    def __init__(self, engine: LLMEngine, cuda: FakeCUDA, family: Family) -> None:
        self.engine, self.cuda, self.family = engine, cuda, family
        self.permits = threading.Semaphore(0)
        self.is_free = False
        cuda.on_synchronize = self._wait
        for source in family.soft_prompts.values():
            engine.pin(Pin(source))
        while engine.soft_prompts.stats.resident < len(family.soft_prompts):
            engine.take_loaded()
            time.sleep(0.001)

    def _wait(self) -> None:
        if not self.is_free:
            assert self.permits.acquire(timeout=30)

    def release(self) -> None:
        """Let all loads go on to their end."""
        self.is_free = True
        self.permits.release(1000)

    def add(self, name: str, soft_prompt: str | None, max_tokens: int, text: int = 0, **more: Any) -> None:
        source = self.family.source(soft_prompt)
        add(self.engine, name, TEXTS[text], greedy(max_tokens), soft_prompt=source, **more)

    def step(self) -> list[TokenEvent]:
        events = self.engine.step()
        self.engine.scheduler.check_integrity()
        return events

    def run(self) -> dict[str, list[TokenEvent]]:
        self.release()
        return run(self.engine)

    def expected(self, soft_prompt: str | None, max_tokens: int, text: int = 0) -> list[int]:
        return self.family.expected(soft_prompt, TEXTS[text], max_tokens)


@pytest.fixture
def serve(
    family: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Served]]:
    monkeypatch.setattr(block_loads, "PIECE_BYTES", PIECE * TOKEN_BYTES)
    monkeypatch.setattr(block_loads, "STEP_FILL_BYTES", 20 * TOKEN_BYTES)
    made: list[Served] = []
    with FakeCUDA(monkeypatch) as cuda:

        def make(**settings: Any) -> Served:
            options: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 6, "kv_cache_memory": 6 * 2**20}
            engine = make_engine(family, fake_cuda_platform(monkeypatch), **{**options, **settings})
            made.append(Served(engine, cuda, family))
            return made[-1]

        yield make
        for served in made:
            served.release()
            served.engine.close()


def test_every_step_beside_a_load_computes_a_token(serve: Callable[..., Served]) -> None:
    served = serve()
    served.add("runs", None, 100)
    answers: dict[str, list[int]] = {"runs": tokens(served.step()), "first": [], "second": []}
    served.add("first", "prefix_long", 5)
    served.add("second", "prefix_long", 5, text=1)
    num_steps = 0
    while not answers["first"]:
        started = {event.request_id: event for event in served.step()}
        assert len(started["runs"].token_ids) == 1
        for name, event in started.items():
            answers[name] += event.token_ids
        num_steps += 1
        if num_steps <= NUM_WAITS:
            assert set(started) == {"runs"}
            served.permits.release()
        else:
            time.sleep(0.001)  # the thread has the last permit
        assert num_steps < 100
    assert answers["second"]
    assert served.engine.stats.soft_prompt_loads == 1
    for name, outputs in served.run().items():
        answers[name] += tokens(outputs)
    assert answers["runs"] == served.expected(None, 100)
    assert answers["first"] == served.expected("prefix_long", 5)
    assert answers["second"] == served.expected("prefix_long", 5, text=1)


def test_a_load_waits_for_the_steps_before_it(serve: Callable[..., Served]) -> None:
    served = serve()
    served.release()
    served.add("first", "prefix_long", 2)
    served.step()
    wait_until(lambda: len(served.engine._loads._jobs._tenants) == 0 and not served.engine._loads._jobs._running, 10)
    (what, number, stream), (then, same, beside), *others = served.cuda.events
    assert (what, stream, then, same) == ("record", DEFAULT_STREAM, "wait", number)
    assert {on for _, _, on in others} == {beside}
    assert beside != DEFAULT_STREAM
    assert sum(done == "record" for done, _, _ in others) == LONG // PIECE + 1
    assert others[-1][0] == "synchronize"
    served.run()


def test_small_prefixes_and_embeddings_start_at_once(serve: Callable[..., Served]) -> None:
    served = serve()
    served.add("small", "prefix_small", 4)
    served.add("embeddings", "prompt_tuning", 4)
    assert {event.request_id for event in served.step()} == {"small", "embeddings"}
    assert served.cuda.events == []


def test_two_prefixes_load_one_after_the_other(serve: Callable[..., Served]) -> None:
    served = serve()
    served.add("long", "prefix_long", 4)
    served.add("other", "prefix_other", 4, text=1)
    served.add("bare", None, 4, text=2)
    served.add("ensemble", "prefix_other", 4, others=(served.family.soft_prompts["prefix_long"],))
    assert {event.request_id for event in served.step()} == {"bare"}
    assert len(served.engine._loads) == 2
    outputs = served.run()
    assert tokens(outputs["long"]) == served.expected("prefix_long", 4)
    assert tokens(outputs["other"]) == served.expected("prefix_other", 4, text=1)
    assert len(tokens(outputs["ensemble"])) == 4


def test_an_abort_during_a_load_releases_its_blocks_when_it_has_stopped(serve: Callable[..., Served]) -> None:
    served = serve()
    blocks = served.engine.scheduler.block_manager
    num_blocks = blocks.num_available
    served.add("gone", "prefix_long", 4)
    served.step()
    served.permits.release(3)
    (event,) = served.engine.abort("gone")
    assert event.finish_reason is FinishReason.ABORT
    assert not served.engine.scheduler.has_work
    assert blocks.num_available == num_blocks - LONG // 16
    served.release()
    wait_until(lambda: served.step() == [] and not served.engine.is_loading, 10)
    assert (blocks.num_available, len(blocks.runs)) == (num_blocks, 0)
    served.add("again", "prefix_long", 4)
    assert tokens(served.run()["again"]) == served.expected("prefix_long", 4)


def test_sequences_run_on_when_a_load_holds_the_last_blocks(serve: Callable[..., Served]) -> None:
    """Of 280 blocks the load takes 256; the two texts need 17 each at their end."""
    served = serve(kv_cache_memory=280 * 16 * TOKEN_BYTES)
    for name, text in (("a", 0), ("b", 1)):
        served.add(name, None, 250, text=text)
    answers = {event.request_id: event.token_ids for event in served.step()}
    served.add("long", "prefix_long", 4, text=2)
    num_empty = 0
    for _ in range(400):
        events = served.step()
        num_empty += not events
        for event in events:
            answers[event.request_id] += event.token_ids
    assert num_empty > 0  # one has all blocks that are left, and waits for those of the load
    assert served.engine.is_loading
    assert not served.engine.has_work
    for name, outputs in served.run().items():
        answers.setdefault(name, []).extend(tokens(outputs))
    assert answers["a"] == served.expected(None, 250)
    assert answers["b"] == served.expected(None, 250, text=1)
    assert answers["long"] == served.expected("prefix_long", 4, text=2)


def test_nothing_else_to_do_is_no_work_until_the_load_ends(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    engine = served.engine
    woken = threading.Event()
    monkeypatch.setattr(engine._loads._jobs, "_on_ended", woken.set)

    def state() -> tuple[bool, bool]:
        return engine.has_work, engine.is_loading

    served.add("long", "prefix_long", 4, timeout=60.0)
    assert state() == (True, False)
    assert served.step() == []
    assert state() == (False, True)
    assert 50 < (engine.idle_seconds or 0) <= 60
    served.add("bare", None, 2)
    assert state() == (True, True)
    assert [len(served.step()) for _ in range(3)] == [1, 1, 0]
    assert state() == (False, True)
    served.release()
    assert woken.wait(10)
    (event,) = served.step()
    assert event.request_id == "long"
    assert state() == (True, False)
    assert engine.idle_seconds is None
    run(engine)


def test_a_request_that_waits_for_a_load_can_time_out(serve: Callable[..., Served]) -> None:
    served = serve()
    served.add("late", "prefix_long", 4, timeout=0.01)
    time.sleep(0.02)
    (event,) = served.step()
    assert failure_of(event).code is ErrorCode.WAIT_TIMEOUT
    served.add("late again", "prefix_long", 4, timeout=0.05)
    served.step()
    time.sleep(0.06)
    (event,) = served.step()
    assert failure_of(event).code is ErrorCode.WAIT_TIMEOUT
    assert served.engine.idle_seconds is None
    served.run()


def test_a_piece_that_fails_ends_only_what_waits_for_it(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    served.is_free = True
    served.add("runs", None, 30, text=2)
    answer = tokens(served.step())
    write = KVCache.write

    def fail_in_the_thread(cache: KVCache, slots: torch.Tensor, rows: torch.Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no such slot")
        write(cache, slots, rows)

    monkeypatch.setattr(KVCache, "write", fail_in_the_thread)
    for name in ("a", "b"):
        served.add(name, "prefix_long", 4)
    served.add("of several", None, 4, others=(served.family.soft_prompts["prefix_long"],))
    served.add("small", "prefix_small", 4)
    outputs = served.run()
    for name in ("a", "b", "of several"):
        failure = failure_of(outputs[name][-1])
        assert failure.code is ErrorCode.FAILED
        assert failure.message == "the soft prompt cannot be copied to the device (RuntimeError: no such slot)"
    assert answer + tokens(outputs["runs"]) == served.expected(None, 30, text=2)
    assert tokens(outputs["small"]) == served.expected("prefix_small", 4)
    monkeypatch.setattr(KVCache, "write", write)
    served.add("again", "prefix_long", 4)
    assert tokens(served.run()["again"]) == served.expected("prefix_long", 4)


def test_an_ensemble_whose_loads_fail_together_ends_once(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    served.is_free = True

    def fail(*_: object) -> None:
        raise RuntimeError("no such slot")

    monkeypatch.setattr(KVCache, "write", fail)
    served.add("both", "prefix_long", 4, others=(served.family.soft_prompts["prefix_other"],))
    assert served.step() == []
    wait_until(lambda: served.engine._loads._jobs._ended.qsize() == 2, 10)
    (event,) = served.step()
    assert failure_of(event).code is ErrorCode.FAILED
    assert served.step() == []
    assert not served.engine.is_loading


def test_a_device_error_in_a_piece_is_the_devices(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    served.is_free = True

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(KVCache, "write", fail)
    served.add("long", "prefix_long", 4)
    with pytest.raises(DeviceError, match="the device failed .AcceleratorError: CUDA error: an illegal memory"):
        served.run()


def test_a_file_that_cannot_be_read_fails_before_any_load(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve()
    source = served.family.soft_prompts["prefix_long"]
    broken = type(source)(
        digest="broken", num_virtual_tokens=LONG, is_key_values=True, path=str(tmp_path / "missing.safetensors")
    )
    request = GenerateRequest(request_id="broken", prompt_token_ids=TEXTS[0], params=greedy(4), soft_prompt=broken)
    assert served.engine.add(request) == []
    assert "cannot be read" in failure_of(served.run()["broken"][-1]).message
    assert served.cuda.events == []
