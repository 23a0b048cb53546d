from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from server.config import EngineSettings
from server.engine.llm_engine import LLMEngine
from server.engine.model.platform import CPUPlatform
from server.engine.types import ErrorCode, FinishReason, GenerateRequest, SamplingParams, SoftPromptSource
from server.errors import EngineStartError
from tests.support.engine.harness import (
    CONTEXT,
    VOCABULARY,
    Family,
    add,
    failure_of,
    greedy,
    random_text,
    run,
    tokens,
)
from tests.support.presence import present

TEXT = random_text(random.Random(3), 24, 24)


def test_describes_its_model(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    model = make_engine(llama).model
    assert (model.architecture, model.dtype, model.device) == ("LlamaForCausalLM", "float32", "cpu")
    assert (model.embedding_width, model.num_layers, model.num_kv_heads, model.head_dim) == (48, 3, 2, 12)
    assert (model.vocab_size, model.max_model_len) == (VOCABULARY, CONTEXT)


def test_stops_at_length_stop_token_and_eos(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    want = llama.expected(None, TEXT, 10)
    stop = want[4]
    first = want.index(stop)
    add(engine, "length", TEXT, greedy(10))
    add(engine, "stop", TEXT, greedy(10, stop_token_ids=(stop,)))
    outputs = run(engine)
    assert tokens(outputs["length"]) == want
    assert outputs["length"][-1].finish_reason is FinishReason.LENGTH
    assert tokens(outputs["stop"]) == want[: first + 1]
    assert (outputs["stop"][-1].finish_reason, outputs["stop"][-1].stop_token_id) == (FinishReason.STOP, stop)


def test_tokens_of_one_step_have_its_number(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama)
    for name in ("one", "two"):
        add(engine, name, TEXT, greedy(5))
    outputs = run(engine)
    steps = [event.step for event in outputs["one"]]
    assert steps == [event.step for event in outputs["two"]]
    first = present(steps[0])
    assert steps == list(range(first, first + 5))
    assert engine.stats.steps == steps[-1]


def test_seeded_sampling_is_the_same_in_every_batch(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.3, top_p=0.95, seed=11)
    soft_prompt = llama.soft_prompts["prefix_13"]
    alone = make_engine(llama)
    add(alone, "mine", TEXT, params, soft_prompt=soft_prompt)
    want = tokens(run(alone)["mine"])
    crowded = make_engine(llama, block_size=4, max_num_batched_tokens=32, max_num_seqs=8)
    for index, source in enumerate(llama.soft_prompts.values()):
        add(
            crowded, f"other{index}", TEXT[index:], SamplingParams(max_tokens=20, temperature=1.0), soft_prompt=source
        )
    add(crowded, "mine", TEXT, params, soft_prompt=soft_prompt)
    assert tokens(run(crowded)["mine"]) == want


def test_choices_of_one_text_prefill_it_once(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, block_size=4)
    for choice in range(3):
        add(engine, f"r{choice}", TEXT, SamplingParams(max_tokens=4, seed=choice))
    run(engine)
    assert engine.stats.prefix_cache_hits == 2 * ((len(TEXT) - 1) // 4 * 4)
    assert engine.stats.steps == 4


def test_abort_in_every_state(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, max_num_seqs=1)
    add(engine, "loading", TEXT, greedy(9), soft_prompt=llama.soft_prompts["p_tuning_7"])
    add(engine, "running", TEXT, greedy(9))
    add(engine, "waiting", TEXT, greedy(9))
    assert [o.finish_reason for o in engine.abort("loading")] == [FinishReason.ABORT]
    engine.step()
    assert engine.stats.num_running == 1
    for name in ("running", "waiting"):
        assert [o.finish_reason for o in engine.abort(name)] == [FinishReason.ABORT]
        assert engine.abort(name) == []
    assert engine.num_unfinished == 0
    assert engine.stats.num_used_blocks == 0


def test_what_never_fits_is_refused_with_the_three_lengths(
    llama: Family, make_engine: Callable[..., LLMEngine]
) -> None:
    engine = make_engine(llama)
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=[1] * 230,
        params=greedy(9),
        soft_prompt=llama.soft_prompts["prompt_tuning_20"],
    )
    (output,) = engine.add(request)
    assert failure_of(output).code is ErrorCode.REFUSED
    assert failure_of(output).message == (
        "20 virtual tokens, 230 text tokens and 9 new ones are more than the 256 positions of the context"
    )


def test_deadlines_end_what_waits_for_a_place_or_for_its_soft_prompt(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, max_num_seqs=1)
    add(engine, "runs", TEXT, greedy(9), timeout=0.05)
    idle = engine.idle_seconds
    assert idle is None
    engine.step()
    add(engine, "waiting", TEXT, greedy(9), timeout=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(engine.soft_prompts, "take_loaded", list)  # a slow disk
        add(engine, "loading", TEXT, greedy(9), soft_prompt=llama.soft_prompts["p_tuning_7"], timeout=0.05)
        assert engine.idle_seconds is not None
        assert engine.idle_seconds <= 0.05
        time.sleep(0.06)
        assert engine.idle_seconds == 0.0
        outputs = {output.request_id: output for output in engine.step()}
    for name in ("waiting", "loading"):
        assert failure_of(outputs[name]).code is ErrorCode.WAIT_TIMEOUT
        assert re.fullmatch(r"the request timed out after 0\.\d seconds .*", failure_of(outputs[name]).message)
    assert engine.stats.num_timeouts == 2
    assert len(tokens(run(engine)["runs"])) > 0
    assert engine.num_unfinished == 0
    assert engine.idle_seconds is None


def test_tenants_share_soft_prompts_and_no_text(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, block_size=4)
    want = llama.expected("prompt_tuning_20", TEXT, 6)
    for name, salt in (("first", "a"), ("other", "b"), ("again", "a")):
        add(engine, name, TEXT, greedy(6), soft_prompt=llama.soft_prompts["prompt_tuning_20"], salt=salt)
        outputs = run(engine)[name]
        assert tokens(outputs) == want
        assert (present(outputs[0].num_cached_tokens) > 0) == (name == "again")
    assert engine.stats.soft_prompt_loads == 1


@pytest.mark.parametrize(
    ("make_file", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01."), "cannot be read"),
        (lambda path: save_file({"other": torch.zeros(4, 48)}, path), "cannot be read"),
        (
            lambda path: save_file({"prompt_embeddings": torch.zeros(4, 47)}, path),
            r"shape \(4, 47\); this model needs \(4, 48\)",
        ),
    ],
    ids=["missing", "pickle", "other tensor", "other width"],
)
def test_soft_prompt_that_cannot_be_loaded_fails_its_requests_alone(
    make_file: Callable[[Path], object],
    message: str,
    llama: Family,
    make_engine: Callable[..., LLMEngine],
    tmp_path: Path,
) -> None:
    engine = make_engine(llama)
    path = tmp_path / "broken.safetensors"
    make_file(path)
    broken = SoftPromptSource(digest="broken", num_virtual_tokens=4, is_key_values=False, path=str(path))
    add(engine, "bad", TEXT, greedy(5), soft_prompt=broken)
    add(engine, "good", TEXT, greedy(5))
    outputs = run(engine)
    (bad,) = outputs["bad"]
    assert failure_of(bad).code is ErrorCode.FAILED
    assert re.search(message, failure_of(bad).message)
    assert tokens(outputs["good"]) == llama.expected(None, TEXT, 5)
    save_file({"prompt_embeddings": torch.ones(4, 48)}, path)
    add(engine, "mended", TEXT, greedy(5), soft_prompt=broken)
    assert len(tokens(run(engine)["mended"])) == 5


def test_a_step_that_raises_ends_its_sequences_and_the_engine_goes_on(
    llama: Family, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama)
    source = llama.soft_prompts["prefix_13"]
    add(engine, "a", TEXT, greedy(5), soft_prompt=source)
    add(engine, "b", TEXT, greedy(5))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda *_: (_ for _ in ()).throw(RuntimeError("kernel fault")))
        outputs = run(engine)
    assert {name: [failure_of(o).message for o in outs] for name, outs in outputs.items()} == {
        "a": ["the model failed to compute this request (RuntimeError: kernel fault)"],
        "b": ["the model failed to compute this request (RuntimeError: kernel fault)"],
    }
    add(engine, "after", TEXT, greedy(5), soft_prompt=source)
    assert tokens(run(engine)["after"]) == llama.expected("prefix_13", TEXT, 5)


def test_bfloat16_runs_every_type(llama: Family, make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(llama, dtype="bfloat16")
    for key, source in llama.soft_prompts.items():
        add(engine, key, TEXT, greedy(6), soft_prompt=source)
    outputs = run(engine)
    assert all(len(tokens(outputs[key])) == 6 for key in llama.soft_prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 999}, "--max-model-len 999 is more than the model's limit of 256"),
        ({"kv_cache_memory": 1000}, "MiB too few: raise --kv-cache-memory or lower --max-model-len"),
        ({"device": "cpu", "gpu_memory_utilization": 0.8}, "on a CPU, set --kv-cache-memory instead"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0 must be above 0, and at most 1"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization 1.1 must be above 0, and at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization nan must be above 0"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"max_num_seqs": 99, "max_num_batched_tokens": 10}, "max_num_seqs 99 must be"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str, llama: Family) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(EngineStartError, match=message):
        LLMEngine(EngineSettings(model=str(llama.path), **settings))


@pytest.mark.parametrize(
    ("checkpoint", "has_fast_bfloat16", "served"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float16", True, "float32"),
        ("float32", True, "float32"),
    ],
)
def test_auto_serves_what_the_processor_is_fast_at(
    checkpoint: str, has_fast_bfloat16: bool, served: str, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, checkpoint)).save_pretrained(tmp_path)
    platform = CPUPlatform()
    platform.has_fast_bfloat16 = has_fast_bfloat16
    engine = LLMEngine(EngineSettings(model=str(tmp_path), max_model_len=64), platform=platform)
    assert engine.model.dtype == served
    engine.close()


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="cannot load the model"):
        LLMEngine(EngineSettings(model=str(tmp_path / "nothing")))


def test_a_damaged_weights_file_is_one_line(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineStartError, match="cannot load the model .*damaged or truncated"):
        LLMEngine(EngineSettings(model=str(tmp_path)))


def test_model_that_attends_otherwise_is_refused(tmp_path: Path) -> None:
    """Bloom adds a bias by distance, which the attention interface does not carry: its tokens would be wrong."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(EngineStartError, match="cannot be served"):
        LLMEngine(EngineSettings(model=str(tmp_path), dtype="float32", max_model_len=64))
