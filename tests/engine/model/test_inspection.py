"""Inspections of soft prompts equal a comparison with the whole embedding matrix."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.llm_engine import LLMEngine
from server.engine.messages import Inspect, Inspected, encode_frame, from_engine_decoder
from server.engine.model import inspection
from server.engine.process import async_engine
from server.engine.types import ErrorCode, GenerateRequest, Inspection, RequestFailure, SoftPromptSource
from server.errors import DeviceError, EngineDeadError, EngineNotReadyError, OverloadedError, RequestFailedError
from tests.engine.process.test_async_engine import TEXT, collect, running
from tests.support.engine.harness import ALL_PEFT_CONFIGS, VOCABULARY, Family, greedy, make_family
from tests.support.presence import present

pytestmark = pytest.mark.slow


def inspect(engine: LLMEngine, source: SoftPromptSource, num_nearest: int = 5) -> Inspected:
    answers: queue.SimpleQueue[Inspected] = queue.SimpleQueue()
    engine.inspect(Inspect(7, source, num_nearest), answers.put)
    answer = answers.get(timeout=30)
    assert answer.inspection_id == 7
    decoded = from_engine_decoder.decode(encode_frame(answer)[4:])
    assert isinstance(decoded, Inspected)
    return decoded


def result(engine: LLMEngine, source: SoftPromptSource, num_nearest: int = 5) -> Inspection:
    answer = inspect(engine, source, num_nearest)
    assert isinstance(answer.outcome, Inspection)
    return answer.outcome


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("gemma2", tmp_path_factory.mktemp("gemma2"), {"p_tuning_7": ALL_PEFT_CONFIGS["p_tuning_7"]})


@pytest.mark.parametrize("chunk_elements", [48 * 10, inspection.CHUNK_ELEMENTS])
def test_nearest_tokens_equal_a_search_of_the_whole_vocabulary(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch, chunk_elements: int
) -> None:
    monkeypatch.setattr(inspection, "CHUNK_ELEMENTS", chunk_elements)
    source = llama.soft_prompts["prompt_tuning_8"]
    found = result(make_engine(llama), source)
    rows = load_file(source.path)["prompt_embeddings"]
    vocabulary = llama.model.get_input_embeddings().weight
    similarities = torch.nn.functional.cosine_similarity(rows[:, None], vocabulary[None], dim=-1)
    values, ids = similarities.topk(5)
    assert [row.norm for row in found.rows] == pytest.approx(rows.norm(dim=-1).tolist())
    assert [[token for token, _ in row.nearest] for row in found.rows] == ids.tolist()
    assert [value for row in found.rows for _, value in row.nearest] == pytest.approx(
        values.flatten().tolist(), abs=1e-6
    )
    norms = vocabulary.norm(dim=-1)
    assert found.vocabulary_norm_mean == pytest.approx(norms.mean().item(), rel=1e-5)
    assert found.vocabulary_norm_std == pytest.approx(norms.std(correction=0).item(), rel=1e-4)
    assert found.layers == []


def test_a_row_that_is_a_token_is_found_as_that_token(
    llama: Family, make_engine: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    vocabulary = llama.model.get_input_embeddings().weight
    rows = torch.stack([3 * vocabulary[11], torch.zeros(48), 1e30 * vocabulary[196]]).detach()
    path = tmp_path / "rows.safetensors"
    save_file({"prompt_embeddings": rows}, path)
    source = SoftPromptSource(digest="d", num_virtual_tokens=3, is_key_values=False, path=str(path))
    found = result(make_engine(llama), source, 1)
    (nearest,) = found.rows[0].nearest
    assert nearest == pytest.approx((11, 1.0))
    assert (found.rows[1].norm, found.rows[1].nearest[0][1]) == (0.0, 0.0)
    (nearest,) = found.rows[2].nearest
    assert nearest == pytest.approx((196, 1.0))
    assert found.rows[2].norm == pytest.approx(1e30 * vocabulary[196].norm().item())


def test_more_neighbours_than_tokens(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    found = result(make_engine(llama), llama.soft_prompts["prompt_tuning_8"], 1000)
    assert sorted(token for token, _ in found.rows[0].nearest) == list(range(VOCABULARY))


def test_the_scale_of_the_embeddings_is_in_the_norms(gemma: Family, make_engine: Callable[..., LLMEngine]) -> None:
    found = result(make_engine(gemma), gemma.soft_prompts["p_tuning_7"])
    embeddings = gemma.model.get_input_embeddings()(torch.arange(VOCABULARY))
    assert found.vocabulary_norm_mean == pytest.approx(embeddings.norm(dim=-1).mean().item(), rel=1e-5)
    assert found.vocabulary_norm_mean > 4 * gemma.model.get_input_embeddings().weight.norm(dim=-1).mean().item()


def test_keys_and_values_are_reported_by_layer(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    source = llama.soft_prompts["prefix_13"]
    found = result(make_engine(llama), source)
    norms = load_file(source.path)["prompt_embeddings"].view(13, 3, 2, 2, 12).norm(dim=-1)
    assert (found.rows, found.vocabulary_norm_mean, len(found.layers)) == ([], None, 3)
    for index, layer in enumerate(found.layers):
        for kind, part in enumerate((layer.keys, layer.values)):
            want = norms[:, index, kind]
            assert (part.mean, part.min, part.max) == pytest.approx(
                (want.mean().item(), want.min().item(), want.max().item())
            )


def test_a_file_that_cannot_be_read(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    source = msgspec.structs.replace(llama.soft_prompts["prompt_tuning_8"], path="/no/such/file")
    answer = inspect(make_engine(llama), source)
    assert isinstance(answer.outcome, RequestFailure)
    assert answer.outcome.code is ErrorCode.FAILED
    assert "cannot be read" in answer.outcome.message


def test_an_unexpected_error_is_answered(
    llama: Family, make_engine: Callable[..., LLMEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(llama)
    engine.runner.embed_tokens = torch.nn.Embedding(3, 48)
    answer = inspect(engine, llama.soft_prompts["prompt_tuning_8"])
    assert isinstance(answer.outcome, RequestFailure)
    assert "IndexError" in answer.outcome.message
    assert "an inspection failed" in caplog.text


def test_a_device_error_ends_the_engine_instead_of_an_answer(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    class Failing(torch.nn.Module):
        def forward(self, _ids: torch.Tensor) -> torch.Tensor:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    engine = make_engine(llama)
    woken, inspector = threading.Event(), engine._inspector
    inspector._on_device_error = woken.set
    engine.runner.embed_tokens = Failing()
    answers: list[Inspected] = []
    engine.inspect(Inspect(1, llama.soft_prompts["prompt_tuning_8"], 5), answers.append)
    assert woken.wait(30)
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        engine.step()
    inspector.close()  # waits for the thread
    assert answers == []


@pytest.mark.anyio
async def test_through_the_engine_process_beside_generation(llama: Family) -> None:
    async with running(llama) as engine:
        stream = engine.generate(GenerateRequest(request_id="r", prompt_token_ids=TEXT, params=greedy(200)))
        await anext(stream)
        found = await engine.inspect(llama.soft_prompts["prompt_tuning_8"], num_nearest=3)
        assert [len(row.nearest) for row in found.rows] == [3] * 8
        bad = msgspec.structs.replace(llama.soft_prompts["prompt_tuning_8"], path="/no/such/file")
        with pytest.raises(RequestFailedError, match="cannot be read"):
            await engine.inspect(bad, num_nearest=3)
        await anext(stream)
        await stream.aclose()


@pytest.mark.anyio
async def test_inspections_never_hang(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama.soft_prompts["prompt_tuning_8"]
    async with running(llama) as engine:
        monkeypatch.setattr(async_engine, "MAX_INSPECTIONS", 2)
        os.kill(present(engine._connection).pid, signal.SIGSTOP)
        waiting = [asyncio.create_task(engine.inspect(source, num_nearest=1)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError, match="2 inspections are waiting"):
            await engine.inspect(source, num_nearest=1)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        with pytest.raises(OverloadedError):  # the engine has not finished yet
            await engine.inspect(source, num_nearest=1)
        os.kill(present(engine._connection).pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await waiting[1]
        with pytest.raises(EngineNotReadyError):
            await engine.inspect(source, num_nearest=1)


@pytest.mark.anyio
async def test_a_drain_waits_for_inspections_and_gives_up_after_its_time(llama: Family) -> None:
    source = llama.soft_prompts["prompt_tuning_8"]
    async with running(llama) as engine:
        task = asyncio.create_task(engine.inspect(source, num_nearest=1))
        await asyncio.sleep(0)
        await engine.drain(30.0)
        assert len((await task).rows) == 8
    async with running(llama) as engine:
        os.kill(present(engine._connection).pid, signal.SIGSTOP)
        task = asyncio.create_task(engine.inspect(source, num_nearest=1))
        await asyncio.sleep(0)
        await engine.drain(0.0)
        with pytest.raises(EngineNotReadyError, match="shutting down"):
            await task
        os.kill(present(engine._connection).pid, signal.SIGCONT)


@pytest.mark.anyio
async def test_pins_reach_the_engine(llama: Family) -> None:
    source = llama.soft_prompts["prompt_tuning_8"]
    async with running(llama, soft_prompt_host_bytes=1) as engine:
        engine.pin(source)
        await engine.prepare(source)
        assert await collect(
            engine, GenerateRequest(request_id="r", prompt_token_ids=TEXT, params=greedy(2), soft_prompt=source)
        )
        assert (engine.stats.host.resident, engine.stats.host.loads) == (1, 1)
        assert engine.stats.host.resident_bytes == 8 * 48 * 4
        assert engine.stats.host.loads == 1
        assert (engine.stats.soft_prompt_misses, engine.stats.soft_prompt_hits) == (1, 1)
        engine.unpin(source)
        for _ in range(200):
            if engine.stats.host.resident == 0:
                break
            await asyncio.sleep(0.01)
        assert (engine.stats.host.resident, engine.stats.host.evictions) == (0, 1)
