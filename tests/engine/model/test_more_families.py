"""PEFT's six types on more model families, in one mixed batch each; and families that are refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    Lfm2Config,
    MambaConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
)

from server.config import EngineSettings
from server.engine.attention.backend import AttentionCall
from server.engine.llm_engine import LLMEngine
from server.errors import EngineStartError
from tests.support.engine.families import FAMILIES, LESS_COMMON, NO_TOKENS, UNTIED
from tests.support.engine.harness import (
    ALL_PEFT_CONFIGS,
    CONTEXT,
    VOCABULARY,
    add,
    check_that_the_store_takes_them,
    greedy,
    make_family,
    run,
    tokens,
)

pytestmark = pytest.mark.slow

MAX_TOKENS = 8
SIX_TYPES = ("prompt_tuning_20", "p_tuning_7", "prefix_13", "multitask_6", "cpt_9", "cartridge_14")
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, **NO_TOKENS}
ALL_LAYERS = "2 of its 2 layers do not call it"
LFM2: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv"],
}
MLA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
SMALL_BLOCKS = {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 24}


@pytest.mark.parametrize("name", FAMILIES | LESS_COMMON)
def test_a_mixed_batch_equals_peft(name: str, tmp_path: Path, make_engine: Callable[..., LLMEngine]) -> None:
    config = (FAMILIES | LESS_COMMON)[name]()
    peft_configs = {key: ALL_PEFT_CONFIGS[key] for key in SIX_TYPES}
    family, rng = make_family(name, tmp_path, peft_configs, config), random.Random(name)
    shared = [rng.randrange(VOCABULARY) for _ in range(14)]
    engine = make_engine(family, **SMALL_BLOCKS)
    check_that_the_store_takes_them(family, engine.model)
    expected = {}
    for soft_prompt, source in [*family.soft_prompts.items(), (None, None)]:
        text = shared + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]
        expected[str(soft_prompt)] = family.expected(soft_prompt, text, MAX_TOKENS)
        add(engine, str(soft_prompt), text, greedy(MAX_TOKENS), soft_prompt=source)
    outputs = run(engine)
    assert {key: tokens(output) for key, output in outputs.items()} == expected
    assert len({tuple(answer) for answer in expected.values()}) == len(expected), "a soft prompt changes nothing"
    assert engine.stats.num_used_blocks == 0
    shutil.rmtree(tmp_path)


def test_attention_with_sinks_is_served_in_bfloat16(tmp_path: Path, make_engine: Callable[..., LLMEngine]) -> None:
    config = FAMILIES["gpt_oss"]()
    family = make_family("gpt_oss", tmp_path, {key: ALL_PEFT_CONFIGS[key] for key in SIX_TYPES[:3]}, config)
    engine = make_engine(family, dtype="bfloat16")  # the startup check compares the logits
    for key, source in family.soft_prompts.items():
        add(engine, key, [1, 2, 3], greedy(5), soft_prompt=source)
    assert {key: len(tokens(output)) for key, output in run(engine).items()} == dict.fromkeys(family.soft_prompts, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_with_wrong_attention_is_refused(
    dtype: str, tmp_path: Path, make_engine: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AttentionCall.of
    without = staticmethod(lambda query, **given: replace(right(query, **given), sinks=None))
    monkeypatch.setattr(AttentionCall, "of", without)
    family = make_family("gpt_oss", tmp_path, {}, FAMILIES["gpt_oss"]())
    with torch.no_grad():
        for layer in family.model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    family.model.save_pretrained(family.path)
    with pytest.raises(EngineStartError, match="its logits differ from its own"):
        make_engine(family, dtype=dtype)


def test_a_quantised_checkpoint_without_its_library_is_reported(tmp_path: Path) -> None:
    config = FAMILIES["phi"]()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(EngineStartError, match="(?i)cannot load the model .*gptq"):
        LLMEngine(EngineSettings(model=str(tmp_path), kv_cache_memory=2**22))


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "bloom": (BloomConfig(**SMALL, hidden_size=48, n_layer=2, n_head=4), ALL_LAYERS),
    "falcon": (FalconConfig(**SMALL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4), ALL_LAYERS),
    "falcon_alibi": (
        FalconConfig(**SMALL, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        ALL_LAYERS,
    ),
    "gptj": (GPTJConfig(**SMALL, n_embd=48, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT), ALL_LAYERS),
    "lfm2": (Lfm2Config(**SMALL, **LFM2), "2 of its 3 layers have no keys and values"),
    "mamba": (MambaConfig(**SMALL, hidden_size=48, num_hidden_layers=2), "it keeps no keys and values"),
    "mla": (DeepseekV3Config(**SMALL, **MLA), r"keys are \(1, 16\) and its values \(1, 8\)"),
    "mpt": (MptConfig(**SMALL, d_model=48, n_layers=2, n_heads=4, max_seq_len=CONTEXT), ALL_LAYERS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_paged_are_refused(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = EngineSettings(model=str(tmp_path), dtype="float32", kv_cache_memory=2**22, max_model_len=128)
    with pytest.raises(EngineStartError, match=f"cannot be served: .*{reason}"):
        LLMEngine(settings)


def test_a_long_context_with_other_frequencies_is_limited_to_the_short_one(
    tmp_path: Path, make_engine: Callable[..., LLMEngine]
) -> None:
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    config = Phi3Config(**UNTIED, original_max_position_embeddings=64, rope_parameters=rope)
    family = make_family("phi3_long", tmp_path, {}, config)
    engine = make_engine(family)
    assert engine.model.max_model_len == 64
    text = list(range(40))
    add(engine, "r", text, greedy(20))
    assert tokens(run(engine)["r"]) == family.expected(None, text, 20)
    with pytest.raises(EngineStartError, match="--max-model-len 65 is more than the model's limit of 64"):
        make_engine(family, max_model_len=65)
