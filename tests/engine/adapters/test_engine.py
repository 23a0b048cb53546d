"""Adapters in the engine: mixed batches equal PEFT, within the memory for adapters, and failures end few."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from server.engine.adapters.backend import AdapterBackend, PlainAdapters
from server.engine.adapters.products import Product
from server.engine.cpu.adapter_backend import CPUAdapters
from server.engine.llm_engine import LLMEngine
from server.engine.messages import PinAdapter, UnpinAdapter
from server.engine.scheduling import block_manager, soft_prompt_run
from server.engine.scheduling.adapter_memory import MAX_READS
from server.engine.scheduling.sequence import Sequence
from server.engine.types import (
    AdapterSource,
    Capability,
    ErrorCode,
    FinishReason,
    GenerateRequest,
    Member,
    SamplingParams,
)
from tests.support.engine.adapters import Adapted, make_adapters, randomise, source_of
from tests.support.engine.harness import Family, add, check_logprobs, failure_of, greedy, random_text, run, tokens
from tests.support.presence import present

pytestmark = pytest.mark.slow

MAX_TOKENS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 24},
    "preempted": {"block_size": 1, "max_num_batched_tokens": 24, "max_num_seqs": 12, "kv_cache_memory": 150_000},
    "room for few": {"block_size": 4, "max_num_seqs": 8, "adapter_host_bytes": 90_000},
}
KINDS = ("attention_4", "all_rslora", "bias", "dora", "ia3", "head_and_embeddings")
SOFT_PROMPTS = ("prompt_tuning_8", "p_tuning_7", "prefix_13", None)


@pytest.fixture(scope="module")
def adapted(make_family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make_adapters(make_family("llama"), tmp_path_factory.mktemp("adapters"), KINDS)


def copies_of(source: AdapterSource, number: int, folder: Path) -> list[AdapterSource]:
    """The same adapter under other digests."""
    sources = []
    for index in range(number):
        path = folder / f"copy{index}.safetensors"
        shutil.copy(source.path, path)
        sources.append(msgspec.structs.replace(source, digest=f"copy{index}", path=str(path)))
    return sources


Request = tuple[str | None, str | None, list[int]]


def requests_of(seed: int) -> dict[str, Request]:
    """Every kind of adapter and none, with and without soft prompts, over few texts with a common beginning."""
    rng = random.Random(seed)
    texts = [[7] * 20 + random_text(rng, 1, 12) for _ in range(2)]
    every = [(kind, soft_prompt) for kind in (*KINDS, None) for soft_prompt in SOFT_PROMPTS]
    rng.shuffle(every)
    return {f"r{index}": (*both, texts[index % 2]) for index, both in enumerate(every)}


def ask(engine: LLMEngine, adapted: Adapted, requests: dict[str, Request], **params: Any) -> None:
    for request_id, (kind, soft_prompt, text) in requests.items():
        add(
            engine,
            request_id,
            text,
            greedy(MAX_TOKENS, **params),
            soft_prompt=adapted.family.source(soft_prompt),
            adapter=None if kind is None else adapted.sources[kind],
        )


@pytest.fixture(scope="module")
def expected(adapted: Adapted) -> dict[str, list[int]]:
    """PEFT's tokens for ``requests_of(1)``."""
    return {
        request_id: adapted.expected(kind, text, MAX_TOKENS, soft_prompt)
        for request_id, (kind, soft_prompt, text) in requests_of(1).items()
    }


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mixed_batch_equals_peft_twice(
    settings: str, adapted: Adapted, expected: dict[str, list[int]], make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(adapted.family, **SETTINGS[settings])
    assert Capability.ADAPTERS in engine.model.capabilities
    assert engine.model.max_adapter_parameters == engine._settings.adapter_host_bytes // 4
    requests = requests_of(1)
    for _ in range(2):  # the prefix cache must not give one adapter's keys to another
        ask(engine, adapted, requests)
        outputs = run(engine)
        assert {request_id: tokens(outputs[request_id]) for request_id in requests} == expected
    stats = engine.stats
    assert stats.adapters.resident_bytes <= engine._settings.adapter_host_bytes
    assert stats.batch_distinct_adapters.count == stats.steps
    assert stats.adapters.hits + stats.adapters.misses >= 2 * len(KINDS) * len(SOFT_PROMPTS)
    if settings == "room for few":
        assert stats.adapters.evictions > 0
    else:
        assert stats.max_batch_distinct_adapters > 3
    assert (stats.num_preemptions > 0) == (settings == "preempted")


@pytest.mark.parametrize(
    ("owners", "name", "fault"),
    [
        (
            [Sequence],
            "flow",
            property(lambda seq: seq.request.soft_prompt.identity if seq.request.soft_prompt else ""),
        ),
        ([block_manager, soft_prompt_run], "run_key", lambda source, adapter: source.identity),
    ],
    ids=["one text for all adapters", "one run for all adapters"],
)
def test_without_the_adapter_in_the_identity_answers_are_wrong(
    owners: list[Any],
    name: str,
    fault: Any,
    adapted: Adapted,
    expected: dict[str, list[int]],
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for owner in owners:
        monkeypatch.setattr(owner, name, fault)
    engine = make_engine(adapted.family, block_size=4)
    requests = requests_of(1)
    wrong = 0
    for _ in range(2):
        ask(engine, adapted, requests)
        outputs: dict[str, Any] = {}
        while engine.num_unfinished:  # the scheduler's own check would find the defect first
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        wrong += sum(tokens(outputs[request_id]) != want for request_id, want in expected.items())
    assert wrong > 5


def test_logprobs_of_a_text_are_those_under_its_adapter(
    adapted: Adapted, make_engine: Callable[..., LLMEngine]
) -> None:
    """The first token's, too: its logits are at the soft prompt's last row, under the adapter."""
    engine = make_engine(adapted.family, block_size=4, max_num_batched_tokens=30, max_num_seqs=30)
    requests = requests_of(2)
    for _ in range(2):
        ask(engine, adapted, requests, logprobs=2, prompt_logprobs=2)
        outputs = run(engine)
        for request_id, (kind, soft_prompt, text) in requests.items():
            if kind is None or (kind == "head_and_embeddings" and soft_prompt is not None):
                continue
            model = adapted.models[kind]
            if soft_prompt is not None:
                adapted.expected(kind, text, 1, soft_prompt)  # makes the pair
                model = adapted.pairs[kind, soft_prompt]
            every = text + tokens(outputs[request_id])
            pair = replace(adapted.family, model=model, peft_models={"": model})
            want = pair.expected_logprobs(None, every)
            events = outputs[request_id]
            found = [*present(events[0].prompt_logprobs), *(one for event in events for one in event.logprobs or [])]
            check_logprobs(found, every, want, num_top=2)


def test_an_ensemble_has_members_under_adapters(adapted: Adapted, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(adapted.family)
    text, sources = random_text(random.Random(4), 9, 9), adapted.sources
    members = [
        Member(adapter=sources["attention_4"]),
        Member(adapter=sources["dora"], soft_prompt=adapted.family.source("p_tuning_7")),
        Member(),
    ]
    for request_id, others in (("alone", members[:1]), ("same", members[:1] * 2), ("mixed", members)):
        first, *rest = others
        request = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=text,
            params=greedy(MAX_TOKENS),
            adapter=first.adapter,
            others=tuple(rest),
        )
        assert engine.add(request) == []
    outputs = run(engine)
    assert tokens(outputs["alone"]) == tokens(outputs["same"])
    assert len(tokens(outputs["mixed"])) == MAX_TOKENS


def test_an_adapter_with_a_head_classifies(
    llama: Family, tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    torch.manual_seed(8)
    base = AutoModelForSequenceClassification.from_pretrained(llama.path, num_labels=3).eval()
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(base, config).eval()
    randomise(model)
    with torch.no_grad():
        for parameter in base.score.parameters():
            parameter.normal_()
    model.save_pretrained(str(tmp_path))
    source = source_of(tmp_path, digest="classifier", num_labels=3)
    engine = make_engine(llama)
    text = random_text(random.Random(5), 12, 12)
    for request_id in ("a", "b"):
        add(engine, request_id, text, SamplingParams(max_tokens=0, classify=True), adapter=source)
    add(engine, "bare", text, greedy(2))
    outputs = run(engine)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([text])).logits[0].tolist()
    for request_id in ("a", "b"):
        assert present(outputs[request_id][0].class_logits) == pytest.approx(want, abs=1e-4)
    assert tokens(outputs["bare"]) == llama.expected(None, text, 2)


def forget_adapters(backend: Any, product: Product, rows: torch.Tensor) -> torch.Tensor:
    """A product whose rows have no adapters."""
    del backend
    return product.original(rows)


@pytest.mark.parametrize("broken", [(CPUAdapters,), (CPUAdapters, PlainAdapters)], ids=["kernels", "both"])
def test_kernels_that_are_not_exact_are_replaced_by_torch_s_operations(
    broken: tuple[type[AdapterBackend], ...],
    adapted: Adapted,
    make_engine: Callable[..., LLMEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If these are not exact either, adapters are off, and the bare model is served."""
    for kind in broken:
        monkeypatch.setattr(kind, "product", forget_adapters)
    engine = make_engine(adapted.family)
    reason = "the logits of a text with an adapter differ from its own"
    assert f"adapters run by torch's operations, which is slower: {reason}" in caplog.text
    text, is_on = [5, 6, 7], len(broken) == 1
    add(engine, "bare", text, greedy(3))
    if is_on:
        add(engine, "adapted", text, greedy(3), adapter=adapted.sources["dora"])
    else:
        assert reason in present(engine.model.adapters_off)
    outputs = run(engine)
    assert tokens(outputs["bare"]) == adapted.expected(None, text, 3)
    assert not is_on or tokens(outputs["adapted"]) == adapted.expected("dora", text, 3)


def test_without_a_head_no_adapter_classifies(adapted: Adapted, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(adapted.family)
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=[1],
        params=SamplingParams(max_tokens=0, classify=True),
        adapter=adapted.sources["dora"],
    )
    (event,) = engine.add(request)
    assert "or an adapter with a classification head" in failure_of(event).message


def test_a_head_that_is_not_in_the_file_fails_the_read(
    adapted: Adapted, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(adapted.family)
    source = msgspec.structs.replace(adapted.sources["dora"], digest="headless", num_labels=2)
    add(engine, "r", [1], SamplingParams(max_tokens=0, classify=True), adapter=source)
    assert failure_of(run(engine)["r"][0]).code is ErrorCode.FAILED


def test_a_failing_read_ends_the_waiting_requests_and_no_other(
    adapted: Adapted, tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(adapted.family, max_num_seqs=2)
    (gone,) = copies_of(adapted.sources["attention_4"], 1, tmp_path)
    Path(gone.path).unlink()
    text = [1, 2, 3]
    for number in range(5):
        add(engine, f"gone{number}", text, greedy(2), adapter=gone)
    add(engine, "pair", text, greedy(2), adapter=gone, soft_prompt=adapted.family.source("p_tuning_7"))
    add(engine, "well", text, greedy(4), adapter=adapted.sources["dora"])
    add(engine, "bare", text, greedy(4))
    outputs = run(engine)
    for request_id in ("gone0", "gone1", "gone2", "gone3", "gone4", "pair"):
        (event,) = outputs[request_id]
        failure = failure_of(event)
        assert failure.code is ErrorCode.FAILED
        assert "adapter copy0 cannot be read" in failure.message
    assert tokens(outputs["well"]) == adapted.expected("dora", text, 4)
    assert outputs["bare"][-1].finish_reason is FinishReason.LENGTH
    assert engine.stats.num_waiting == engine.stats.num_running == 0


def test_an_adapter_that_never_fits_is_refused(adapted: Adapted, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(adapted.family, adapter_host_bytes=4_000)
    request = GenerateRequest(request_id="r", prompt_token_ids=[1], params=greedy(1), adapter=adapted.sources["dora"])
    (event,) = engine.add(request)
    assert failure_of(event).code is ErrorCode.REFUSED
    assert "--adapter-host-memory" in failure_of(event).message


def test_an_adapter_that_is_larger_than_recorded_ends_its_requests(
    adapted: Adapted, make_engine: Callable[..., LLMEngine]
) -> None:
    """Those whose turn has not come, too: those that wait for a soft prompt are refused when they are scheduled."""
    engine = make_engine(adapted.family, adapter_host_bytes=4_000)
    source = msgspec.structs.replace(adapted.sources["dora"], num_parameters=10)
    add(engine, "r", [1], greedy(1), adapter=source)
    add(engine, "s", [1], greedy(1), adapter=source, soft_prompt=adapted.family.source("p_tuning_7"))
    seen = {}
    while engine.num_unfinished:
        for event in engine.step():
            seen[event.request_id] = failure_of(event)
        time.sleep(0.001)
    assert seen["r"].code is ErrorCode.REFUSED
    assert "are more than the 4000" in seen["r"].message or "need" in seen["r"].message
    assert seen["s"].code is ErrorCode.REFUSED
    assert engine.soft_prompts.stats.resident <= 1
    engine.scheduler.check_integrity()


def test_an_adapter_whose_products_overflow_fails_alone(
    adapted: Adapted, tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    """All values of its file are finite; the upload's trial (``probe_member``) is such a request."""
    source = adapted.sources["attention_4"]
    huge = tmp_path / "huge.safetensors"
    save_file({name: tensor * 1e25 for name, tensor in load_file(source.path).items()}, huge)
    engine, text = make_engine(adapted.family), [1, 2, 3]
    add(engine, "huge", text, greedy(2), adapter=msgspec.structs.replace(source, digest="huge", path=str(huge)))
    add(engine, "well", text, greedy(4), adapter=source)
    add(engine, "bare", text, greedy(4))
    outputs = run(engine)
    assert failure_of(outputs["huge"][-1]).code is ErrorCode.NOT_FINITE
    assert tokens(outputs["well"]) == adapted.expected("attention_4", text, 4)
    assert tokens(outputs["bare"]) == adapted.family.expected(None, text, 4)


def test_pins_are_read_beside_the_steps_and_stay(
    adapted: Adapted, tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(adapted.family, adapter_host_bytes=60_000)
    pinned = adapted.sources["attention_4"]
    engine.pin(PinAdapter(pinned))
    while engine.stats.adapters.resident == 0:
        engine.step()
    others = copies_of(adapted.sources["attention_4"], 12, tmp_path)
    for index, source in enumerate(others):
        add(engine, f"r{index}", [1, 2], greedy(2), adapter=source)
    run(engine)
    misses, evictions = engine.stats.adapters.misses, engine.stats.adapters.evictions
    assert evictions > 0
    add(engine, "pinned", [1, 2], greedy(2), adapter=pinned)
    run(engine)
    assert engine.stats.adapters.misses == misses
    engine.pin(UnpinAdapter(pinned))
    too_large = msgspec.structs.replace(pinned, digest="large", num_parameters=10**9)
    engine.pin(PinAdapter(too_large))  # ignored, with a warning
    assert not engine.is_loading


def test_more_adapters_than_room_end_within_the_budget(
    adapted: Adapted, tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    budget = 8 * 9_000
    engine = make_engine(adapted.family, adapter_host_bytes=budget, max_num_seqs=16)
    source, text = adapted.sources["attention_4"], [3, 1, 4]
    sources = copies_of(source, 60, tmp_path)
    for number in range(120):
        add(engine, f"r{number}", text, greedy(3), adapter=sources[number % 60])
    want = adapted.expected("attention_4", text, 3)
    assert engine.stats.adapters.misses == 0  # nothing is read at arrival
    outputs: dict[str, list[Any]] = {}
    while engine.num_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
        stats = engine.stats.adapters
        assert stats.resident_bytes <= budget
        memory = present(engine.adapters).memory
        assert len(memory._entries) - stats.resident <= MAX_READS
    assert all(tokens(events) == want for events in outputs.values())
    assert len(outputs) == 120
    assert engine.stats.adapters.evictions > 40
    assert engine.stats.adapter_wait_seconds.count == 120


def test_aborted_and_expired_requests_release_their_adapters(
    adapted: Adapted, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(adapted.family, max_num_seqs=1)
    source = adapted.sources["dora"]
    add(engine, "run", [1, 2], greedy(30), adapter=source)
    add(engine, "late", [1, 2], greedy(2), adapter=adapted.sources["bias"], timeout=0.0)
    add(engine, "gone", [1, 2], greedy(2), adapter=source)
    events = {event.request_id: [event] for event in engine.step()}
    (event,) = engine.abort("gone")
    assert event.finish_reason is FinishReason.ABORT
    events |= run(engine)
    assert failure_of(events["late"][0]).code is ErrorCode.WAIT_TIMEOUT
    assert not present(engine.adapters).memory.is_used
    assert engine.scheduler.adapters._turns == {}
