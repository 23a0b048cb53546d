"""What an adapter's files adapt: the same modules, ranks and scales as in PEFT, or every fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

from prompt_store.errors import InvalidPromptError
from prompt_store.files.lora.adapter_layout import PREFIX, adapter_layout, read_layout
from prompt_store.files.lora.lora_config import read_lora_config
from tests.prompt_store.conftest import LLAMA_SHAPE

LLAMA = LlamaConfig(
    **LLAMA_SHAPE,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.1\.self_attn\.[qk]_proj": 2, "down_proj": 3, r"^model\.layers\.(0|1)\.mlp\.[gu].*": 5},
    "alpha_pattern": {"self_attn.q_proj": 7, "layers.0.self_attn.q_proj": 9, "layers.0.mlp.up_proj|v_proj": 0.5},
}
LORA: dict[str, Callable[[], LoraConfig]] = {
    "attention": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "patterns": lambda: LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear", **PATTERNS),
    "whole": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head", "o_proj"]),
    "bias": lambda: LoraConfig(r=3, lora_bias=True, target_modules=["q_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["k_proj", "gate_proj"]),
    "task": lambda: LoraConfig(r=4, target_modules=["k_proj"], task_type=TaskType.CAUSAL_LM, init_lora_weights=False),
}


def save(model: PreTrainedConfig, config: PeftConfig, folder: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(model)
    base.config._name_or_path = base.name_or_path = ""
    get_peft_model(base, config).save_pretrained(str(folder))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    fields = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return fields, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", LORA)
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers", "ignore:.*no bias", "ignore:.*invalid shape")
def test_ranks_and_scales_are_those_of_peft(name: str, tmp_path: Path) -> None:
    save(LLAMA, LORA[name](), tmp_path)
    # Saving sorts the patterns, so the first that matches may be another than in training.
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(LLAMA), str(tmp_path))
    fields, shapes = read(tmp_path)
    layout, faults = read_layout(fields, shapes)
    assert faults == []
    expected = {
        module_name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for module_name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {one.name: (one.rank, one.scale) for one in layout.modules} == expected
    assert [one.name for one in layout.modules] == sorted(expected)
    used = {tensor for one in layout.modules for tensor in one.tensors.values()}
    assert used | layout.copies.keys() == shapes.keys()
    parts = {part for one in layout.modules for part in one.tensors}
    assert parts == {"A", "B"} | {"bias": {"bias"}, "dora": {"magnitude"}}.get(name, set())
    copies = {("model.embed_tokens", "weight"), ("lm_head", "weight")} if name == "whole" else set()
    assert set(layout.copies.values()) == copies


def test_conv1d_and_fused_modules_are_read(tmp_path: Path) -> None:
    save(GPT2, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tmp_path)
    names = [one.name for one in adapter_layout(*read(tmp_path))]
    assert names == sorted(
        f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    )


@pytest.mark.parametrize("feedforward", [["down_proj"], r".*\.mlp\..*", None])
def test_ia3_is_read(tmp_path: Path, feedforward: Any) -> None:
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=feedforward or ["down_proj"]
    )
    save(LLAMA, config, tmp_path)
    fields, shapes = read(tmp_path)
    modules = adapter_layout(fields | {"feedforward_modules": feedforward}, shapes)
    assert len(modules) == 6
    for one in modules:
        assert (one.rank, one.scale, set(one.tensors)) == (0, 1.0, {"gain"})
        assert one.gain_on_input is one.name.endswith("down_proj")


FIELDS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
SHAPES: dict[str, tuple[int, ...]] = {A: (4, 32), B: (32, 4)}
BIAS, MAGNITUDE = f"{PREFIX}{MODULE}.lora_B.bias", f"{PREFIX}{MODULE}.lora_magnitude_vector"
IA3 = f"{PREFIX}{MODULE}.ia3_l"
EMBED_A, EMBED_B = f"{PREFIX}model.embed_tokens.lora_embedding_A", f"{PREFIX}model.embed_tokens.lora_embedding_B"
EMBEDDING: dict[str, tuple[int, ...]] = {EMBED_A: (4, 60), EMBED_B: (32, 4)}


def codes(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    with pytest.raises(InvalidPromptError) as caught:
        adapter_layout(fields, shapes)
    assert all(fault.message.isascii() and len(fault.message) < 600 for fault in caught.value.faults)
    return [fault.code for fault in caught.value.faults]


def test_the_small_file_is_good() -> None:
    (module,) = adapter_layout(FIELDS, SHAPES)
    assert (module.name, module.rank, module.scale) == (MODULE, 4, 2.0)
    assert module.tensors == {"A": A, "B": B}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "unsupported_peft_type"),
        ({"r": None}, "missing_field"),
        ({"lora_alpha": None}, "missing_field"),
        ({"r": 0}, "invalid_field"),
        ({"r": -4}, "invalid_field"),
        ({"r": 4.0}, "invalid_field"),
        ({"r": True}, "invalid_field"),
        ({"r": 10**400}, "invalid_field"),
        ({"lora_alpha": "8"}, "invalid_field"),
        ({"lora_alpha": float("nan")}, "invalid_field"),
        ({"lora_alpha": float("inf")}, "invalid_field"),
        ({"lora_alpha": 10**400}, "invalid_field"),
        ({"r": 8}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 0}}, "invalid_field"),
        ({"rank_pattern": ["q_proj"]}, "invalid_field"),
        ({"alpha_pattern": {"q_proj": "x"}}, "invalid_field"),
        ({"rank_pattern": {r"([a-z._0-9]+)+X": 4}}, "unsafe_pattern"),
        ({"alpha_pattern": {"(": 4}}, "unsafe_pattern"),
        ({"alpha_pattern": {f"{index:04}" + "a?" * 250: 4 for index in range(4096)}}, "unsafe_pattern"),
        ({"rank_pattern": {f"{index:04}": 4 for index in range(4097)}}, "invalid_field"),
        ({"use_rslora": 1}, "invalid_field"),
        ({"use_dora": True}, "missing_tensor"),
        ({"lora_bias": True}, "missing_tensor"),
        ({"bias": "all"}, "replaces_base"),
        ({"bias": "lora_only"}, "replaces_base"),
        ({"bias": 3}, "invalid_field"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "replaces_base"),
        ({"modules_to_save": "score"}, "invalid_field"),
        *(
            ({"init_lora_weights": name}, "changes_base")
            for name in ("pissa", "pissa_niter_4", "OLoRA", "corda", "loftq")
        ),
        ({"init_lora_weights": "unknown"}, "invalid_field"),
        ({"init_lora_weights": 3}, "invalid_field"),
        *(
            ({key: value}, "unsupported_variant")
            for key, value in {
                "alora_invocation_tokens": [1, 2],
                "arrow_config": {"top_k": 3},
                "kasa_config": {"beta": 1},
                "layer_replication": [[0, 1], [0, 2]],
                "monteclora_config": {"x": 1},
                "target_parameters": ["experts.gate_up_proj"],
                "trainable_token_indices": [3],
                "use_bdlora": {"nblocks": 2},
                "use_qalora": True,
                "velora_config": {"num_groups": 2},
            }.items()
        ),
    ],
)
def test_faults_of_fields(changes: dict[str, Any], code: str) -> None:
    assert codes(FIELDS | changes, SHAPES) == [code]


@pytest.mark.parametrize("name", ["gaussian", "eva", "orthogonal", "mica", "lora_ga", True, False, None])
def test_initialisations_that_leave_the_base_alone_are_served(name: object) -> None:
    assert adapter_layout(FIELDS | {"init_lora_weights": name}, SHAPES)


@pytest.mark.parametrize(
    ("fields", "shapes", "expected"),
    [
        ({}, {}, ["missing_tensor"]),
        ({}, {A: (4, 32)}, ["missing_tensor"]),
        ({}, {B: (32, 4)}, ["missing_tensor"]),
        ({"use_dora": True}, {MAGNITUDE: (32,)}, ["missing_tensor"]),
        ({}, SHAPES | {MAGNITUDE: (32,)}, ["unexpected_tensor"]),
        ({}, SHAPES | {BIAS: (32,)}, ["unexpected_tensor"]),
        ({}, SHAPES | {IA3: (32, 1)}, ["missing_tensor"]),
        ({}, {IA3: (32, 1)}, ["missing_tensor", "missing_tensor"]),
        ({"peft_type": "IA3"}, SHAPES, ["missing_tensor"]),
        ({"peft_type": "IA3"}, SHAPES | {IA3: (32, 1)}, ["missing_tensor"]),
        ({}, {A: (128,), B: (0,)}, ["shape_mismatch", "shape_mismatch"]),
        ({}, {A: (4, 0), B: (32, 4)}, ["shape_mismatch"]),
        ({}, {A: (4, 32), B: (32, 5)}, ["shape_mismatch"]),
        ({"lora_bias": True}, SHAPES | {BIAS: (31,)}, ["shape_mismatch"]),
        ({"use_dora": True}, SHAPES | {MAGNITUDE: (32, 1)}, ["shape_mismatch"]),
        ({"use_dora": True}, EMBEDDING, ["unsupported_variant"]),
        (
            {"use_dora": True},
            EMBEDDING | {EMBED_A.replace("embedding_A", "magnitude_vector"): (32,)},
            ["unsupported_variant"],
        ),
        ({"lora_bias": True}, EMBEDDING, ["unsupported_variant"]),
        ({"ensure_weight_tying": True}, EMBEDDING, ["unsupported_variant"]),
        (
            {},
            SHAPES | {A.replace("lora_A.weight", "lora_embedding_A"): (4, 60)},
            ["unexpected_tensor"],
        ),
        ({}, SHAPES | {"prompt_embeddings": (4, 32)}, ["unexpected_tensor"]),
        ({}, SHAPES | {A.replace("weight", "default.weight"): (4, 32)}, ["unexpected_tensor"]),
        (
            {},
            SHAPES | {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (4, 32)},
            ["unsupported_variant"],
        ),
        ({}, SHAPES | {f"{PREFIX}{MODULE}.lora_diag": (4,)}, ["unexpected_tensor"]),
        ({}, {A.removeprefix(PREFIX): (4, 32)}, ["unknown_module"]),
        ({"peft_type": "IA3", "feedforward_modules": ["q_proj"]}, {IA3: (32, 1)}, ["shape_mismatch"]),
        ({"peft_type": "IA3", "feedforward_modules": ["k_proj"]}, {IA3: (1, 32)}, ["shape_mismatch"]),
        ({"peft_type": "IA3"}, {IA3: (32,)}, ["shape_mismatch"]),
        ({"peft_type": "IA3", "feedforward_modules": "("}, {IA3: (32, 1)}, ["unsafe_pattern"]),
        ({"peft_type": "IA3", "feedforward_modules": [1]}, {IA3: (32, 1)}, ["invalid_field"]),
    ],
)
def test_faults_of_tensors(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], expected: list[str]) -> None:
    assert codes(FIELDS | fields, shapes) == expected


def test_all_faults_are_reported_and_each_kind_is_limited() -> None:
    shapes = {f"{PREFIX}model.layers.{index}.q_proj.lora_A.weight": (4, 32) for index in range(100)}
    with pytest.raises(InvalidPromptError) as caught:
        adapter_layout(FIELDS | {"bias": "all", "use_qalora": True}, shapes)
    found = [fault.code for fault in caught.value.faults]
    assert found == ["unsupported_variant", "replaces_base", *["missing_tensor"] * 9]
    assert caught.value.faults[-1].message == "92 more faults of this kind (missing_tensor)"


def shapes_of(num_layers: int, modules: Sequence[str] = ("self_attn.q_proj",)) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(num_layers):
        for module in modules:
            name = f"{PREFIX}model.layers.{index}.{module}"
            shapes |= {f"{name}.lora_A.weight": (4, 32), f"{name}.lora_B.weight": (32, 4)}
    return shapes


def test_too_much_matching_is_refused() -> None:
    shapes = shapes_of(3000)
    patterns = {r"^.*.*.*.*.*" + str(index): 4 for index in range(1000)}
    assert codes(FIELDS | {"rank_pattern": patterns}, shapes) == ["unsafe_pattern"]


def test_a_rank_for_each_module_of_a_large_model_is_looked_up() -> None:
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    shapes = shapes_of(126, [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)])
    patterns = {name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): 4 for name in shapes if "lora_A" in name}
    fields = {"rank_pattern": patterns, "alpha_pattern": dict.fromkeys(patterns, 8)}
    assert len(adapter_layout(FIELDS | fields | {"r": 1}, shapes)) == 882


def test_a_head_and_copies_of_the_base_are_told_apart() -> None:
    head = f"{PREFIX}score.weight"
    shapes = SHAPES | {
        head: (3, 32),
        f"{PREFIX}lm_head.base_layer.weight": (60, 32),
        f"{PREFIX}model.norm.weight": (32,),
    }
    layout, faults = read_layout(FIELDS, shapes)
    assert faults == []
    assert layout.heads == (head,)
    assert sorted(layout.copies.values()) == [("lm_head", "weight"), ("model.norm", "weight")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "modules_to_save",
    "use_dora",
]


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*KEYS, "feedforward_modules", "lora_bias", "use_rslora", "use_bdlora"]), JSON),
    st.sampled_from(["LORA", "IA3"]),
    st.dictionaries(
        st.sampled_from([A, B, BIAS, MAGNITUDE, IA3, EMBED_A, EMBED_B])
        | st.text(max_size=20).map(lambda tail: PREFIX + tail),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        max_size=5,
    ),
)
def test_any_fields_and_names_are_a_layout_or_faults(
    changes: dict[str, Any], peft_type: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    fields = {"r": 4, "lora_alpha": 8} | changes | {"peft_type": peft_type}
    layout, faults = read_layout(fields, shapes)
    read_lora_config(fields)
    if not faults:
        used = [tensor for one in layout.modules for tensor in one.tensors.values()]
        assert sorted([*used, *layout.heads, *layout.copies]) == sorted(shapes)
        assert used
