"""A step of a real model that raises for one request: the others' tokens are PEFT's, and only that one ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.engine.device_faults import is_device_fault
from server.engine.llm_engine import LLMEngine
from server.engine.model.soft_prompts import SoftPromptLoader
from server.engine.scheduling.plan import Chunk, StepPlan
from server.engine.scheduling.sequence import Sequence
from server.engine.scheduling.step_parts import retry_in_parts
from server.engine.types import (
    ErrorCode,
    FinishReason,
    RequestFailure,
    SamplingParams,
    SoftPromptSource,
    StepOutput,
    TokenEvent,
)
from server.errors import DeviceError
from tests.support.engine.classifiers import make_classifier
from tests.support.engine.harness import Family, add, check_logprobs, failure_of, greedy, random_text, run, tokens
from tests.support.engine.platforms import PlainPlatform
from tests.support.engine.sequences import make_sequence

pytestmark = pytest.mark.slow

TEXT = random_text(random.Random(5), 30, 30)
MESSAGE = "the model failed to compute this request (IndexError: bad row)"
SMALL = {"block_size": 4, "max_num_batched_tokens": 32, "max_num_seqs": 12}


def break_steps(engine: LLMEngine, is_bad: Callable[[Chunk], bool]) -> list[int]:
    """Let every pass with a bad chunk raise, after it has computed all; returns the sizes of the plans that came."""
    launch = engine.runner.launch
    sizes: list[int] = []

    def launch_or_raise(plan: StepPlan, soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        sizes.append(len(plan.chunks))
        output = launch(plan, soft_prompts)()
        if any(is_bad(chunk) for chunk in plan.chunks):
            raise IndexError("bad row")
        return lambda: output

    engine.runner.launch = launch_or_raise  # type: ignore[method-assign]
    return sizes


def of_bad(chunk: Chunk) -> bool:
    return chunk.seq is not None and chunk.seq.request_id.partition("/")[0] == "bad"


def add_healthy(engine: LLMEngine, family: Family) -> None:
    for name, source in [*family.soft_prompts.items(), ("None", None)]:
        add(engine, name, TEXT, greedy(8), soft_prompt=source)
    add(engine, "seeded", TEXT, SamplingParams(max_tokens=8, temperature=1.2, seed=7))
    add(engine, "scored", TEXT, greedy(0, prompt_logprobs=2))


def check_healthy(outputs: dict[str, list[TokenEvent]], family: Family, seeded: list[int]) -> None:
    for name in [*family.soft_prompts, "None"]:
        assert tokens(outputs[name]) == family.expected(None if name == "None" else name, TEXT, 8), name
        assert outputs[name][-1].finish_reason is FinishReason.LENGTH
    assert tokens(outputs["seeded"]) == seeded
    check_logprobs(outputs["scored"][0].prompt_logprobs, TEXT, family.expected_logprobs(None, TEXT), num_top=2)


@pytest.fixture
def seeded(llama: Family, make_engine: Callable[..., LLMEngine]) -> list[int]:
    """What the seeded sequence says in steps that do not raise."""
    engine = make_engine(llama)
    add(engine, "seeded", TEXT, SamplingParams(max_tokens=8, temperature=1.2, seed=7))
    return tokens(run(engine)["seeded"])


PHASES: dict[str, tuple[dict[str, Any], Callable[[Chunk], bool]]] = {
    "prefill": ({"params": greedy(8)}, of_bad),
    "later chunk": ({"params": greedy(8)}, lambda chunk: of_bad(chunk) and chunk.start >= 8),
    "decode": ({"params": greedy(8)}, lambda chunk: of_bad(chunk) and chunk.start > len(TEXT) + 2),
    "scoring": ({"params": greedy(0, prompt_logprobs=1)}, of_bad),
    "behind keys and values": ({"params": greedy(8), "soft_prompt": "prefix_13"}, of_bad),
    "behind embeddings": ({"params": greedy(8), "soft_prompt": "p_tuning_7"}, of_bad),
    "ensemble": ({"params": greedy(8), "others": ["prefix_13", "p_tuning_7"]}, of_bad),
}


@pytest.mark.parametrize("phase", PHASES)
def test_one_request_ends_and_no_other_changes(
    phase: str, llama: Family, make_engine: Callable[..., LLMEngine], seeded: list[int]
) -> None:
    engine = make_engine(llama, **SMALL)
    fields, is_bad = PHASES[phase]
    fields = dict(fields)
    if "soft_prompt" in fields:
        fields["soft_prompt"] = llama.soft_prompts[fields["soft_prompt"]]
    if "others" in fields:
        fields["others"] = tuple(llama.soft_prompts[name] for name in fields["others"])
    sizes = break_steps(engine, is_bad)
    add(engine, "bad", TEXT, **fields)  # before the others, which then find its text's blocks
    add_healthy(engine, llama)
    outputs = run(engine)
    assert failure_of(outputs["bad"][-1]) == RequestFailure(ErrorCode.FAILED, MESSAGE)
    check_healthy(outputs, llama, seeded)
    assert engine.stats.num_used_blocks == 0
    assert len(sizes) < 60


def test_a_classifier_that_fails_fails_alone(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path, seeded: list[int]
) -> None:
    engine = make_engine(llama, **SMALL)
    classifiers = {key: make_classifier(llama, key, tmp_path / key) for key in ("prompt_tuning", "prefix")}
    break_steps(engine, of_bad)
    add(engine, "bad", TEXT, greedy(0, classify=True), soft_prompt=classifiers["prompt_tuning"].source)
    add(engine, "good", TEXT, greedy(0, classify=True), soft_prompt=classifiers["prefix"].source)
    add_healthy(engine, llama)
    outputs = run(engine)
    assert [failure_of(output).message for output in outputs["bad"]] == [MESSAGE]
    assert outputs["good"][0].class_logits == pytest.approx(classifiers["prefix"].expected(TEXT), abs=1e-3)
    check_healthy(outputs, llama, seeded)


@pytest.mark.parametrize("fails_from", [0, 8])
def test_a_soft_prompt_that_cannot_be_filled_ends_those_that_use_it(
    fails_from: int, llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path, seeded: list[int]
) -> None:
    save_file({"prompt_embeddings": torch.ones(40, 48)}, tmp_path / "broken.safetensors")
    broken = SoftPromptSource(
        digest="broken", num_virtual_tokens=40, is_key_values=False, path=str(tmp_path / "broken.safetensors")
    )
    engine = make_engine(llama, **SMALL)
    break_steps(
        engine, lambda chunk: chunk.run is not None and chunk.run.key == "broken" and chunk.start >= fails_from
    )
    for index in range(3):
        add(engine, f"uses{index}", TEXT, greedy(4), soft_prompt=broken)
    add(engine, "one of several", TEXT, greedy(4), others=(broken,))
    add_healthy(engine, llama)
    outputs = run(engine)
    for name in ("uses0", "uses1", "uses2", "one of several"):
        assert [failure_of(output).message for output in outputs[name]] == [MESSAGE], name
    check_healthy(outputs, llama, seeded)
    assert "broken" not in engine.scheduler.block_manager.runs


def test_parts_that_pass_only_apart_all_pass(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    """Memory for a whole step may be short where it is enough for each half."""
    engine = make_engine(llama)
    launch = engine.runner.launch

    def launch_if_small(plan: StepPlan, soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        if len(plan.chunks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(plan, soft_prompts)

    engine.runner.launch = launch_if_small  # type: ignore[method-assign]
    for index in range(7):
        add(engine, f"r{index}", TEXT[index:], greedy(5))
    outputs = run(engine)
    for index in range(7):
        assert tokens(outputs[f"r{index}"]) == llama.expected(None, TEXT[index:], 5)


def test_sequences_that_only_wait_are_not_ended_by_anothers_step(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama, max_num_seqs=1)
    break_steps(engine, of_bad)
    add(engine, "bad", TEXT, greedy(5))
    add(engine, "waits", TEXT, greedy(5))
    outputs = run(engine)
    assert [failure_of(output).message for output in outputs["bad"]] == [MESSAGE]
    assert tokens(outputs["waits"]) == llama.expected(None, TEXT, 5)


def test_a_device_error_is_raised_at_once_and_ends_no_sequence(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama)
    calls: list[int] = []

    def break_down(plan: StepPlan, _soft_prompts: SoftPromptLoader) -> Callable[[], StepOutput]:
        calls.append(len(plan.chunks))
        if len(calls) == 2:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        raise IndexError("bad row")

    monkeypatch.setattr(engine.runner, "launch", break_down)
    for name in "abcd":
        add(engine, name, TEXT, greedy(5))
    with pytest.raises(DeviceError, match="the device failed .AcceleratorError: CUDA error: device-side assert"):
        run(engine)
    assert calls == [4, 2]
    assert engine.num_unfinished == 4


class CheckedPlatform(PlainPlatform):
    """Fails its check from some call on; 0 for the first, None for never."""

    def __init__(self, fails_at: int | None) -> None:
        super().__init__()
        self.num_checks = 0
        self._fails_at = fails_at

    def check_device(self) -> None:
        self.num_checks += 1
        if self._fails_at is not None and self.num_checks > self._fails_at:
            raise RuntimeError("unspecified launch failure")


@pytest.mark.parametrize("fails_at", [0, 1], ids=["at once", "in a half"])
def test_an_error_after_which_the_device_fails_its_check_is_the_devices(
    fails_at: int, llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    platform = CheckedPlatform(fails_at)
    engine = make_engine(llama, platform)
    sizes = break_steps(engine, of_bad)
    add(engine, "bad", TEXT, greedy(5))
    add(engine, "good", TEXT[1:], greedy(5))
    with pytest.raises(DeviceError, match="the device failed .RuntimeError: unspecified launch failure"):
        run(engine)
    assert len(sizes) == platform.num_checks == fails_at + 1


def test_an_error_after_which_the_device_passes_its_check_is_the_requests(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    platform = CheckedPlatform(None)
    engine = make_engine(llama, platform)
    break_steps(engine, of_bad)
    add(engine, "bad", TEXT, greedy(5))
    add(engine, "good", TEXT[1:], greedy(5))
    outputs = run(engine)
    assert [failure_of(output).message for output in outputs["bad"]] == [MESSAGE]
    assert tokens(outputs["good"]) == llama.expected(None, TEXT[1:], 5)
    assert platform.num_checks == 2


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (IndexError("CUDA error"), False),
    ],
)
def test_faults_of_the_device_are_told_apart(error: Exception, is_fault: bool) -> None:
    assert is_device_fault(error) == is_fault


def test_a_sequence_that_fails_after_its_step_fails_alone(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama)
    advance = engine._advance

    def advance_or_raise(seq: Sequence, *more: Any) -> TokenEvent:
        if seq.request_id == "bad" and seq.num_new_tokens == 2:
            raise IndexError("bad row")
        return advance(seq, *more)

    monkeypatch.setattr(engine, "_advance", advance_or_raise)
    add(engine, "bad", TEXT, greedy(5))
    add(engine, "good", TEXT, greedy(5))
    outputs = run(engine)
    assert tokens(outputs["bad"]) == llama.expected(None, TEXT, 2)
    assert failure_of(outputs["bad"][-1]) == RequestFailure(ErrorCode.FAILED, MESSAGE)
    assert tokens(outputs["good"]) == llama.expected(None, TEXT, 5)
    assert engine.stats.num_used_blocks == 0


def test_a_reader_without_a_part_in_the_step_is_recomputed_too() -> None:
    writer, reader, other = (
        make_sequence(name, [1, 2, 3, 4], SamplingParams()) for name in ("writer", "reader", "other")
    )
    writer.block_table, reader.block_table, other.block_table = [0, 1], [0, 2], [3]
    plan = StepPlan(chunks=[Chunk(writer.block_table, 0, 4, seq=writer), Chunk(other.block_table, 0, 2, seq=other)])

    def run_plan(part: StepPlan) -> StepOutput:
        if any(chunk.seq is writer for chunk in part.chunks):
            raise IndexError("bad row")
        return StepOutput([])

    retry = retry_in_parts(
        plan, [writer, reader, other], run_plan, IndexError(), block_size=2, on_error=lambda _: None
    )
    assert [part.owner for part, _ in retry.failed] == [writer]
    assert retry.unserved == [reader]
    assert [chunk.seq for chunk in retry.plan.chunks] == [other]


def test_a_number_that_chose_no_token_is_drawn_again() -> None:
    again, once = (make_sequence(name, [1], SamplingParams(seed=5)) for name in ("again", "once"))
    again.keep_draw()  # nothing was drawn yet
    for token in range(4):
        number = once.draw()
        for _ in range(3):
            assert again.draw() == number
            again.keep_draw()
            again.keep_draw()
        assert again.draw() == number
        for seq in (again, once):
            seq.token_ids.append(token)
        again.keep_draw()  # of the token before
