"""An adapter is checked with the modules of the base; nothing in its file is ignored or loaded over the base."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, TaskType, get_peft_model
from safetensors.numpy import save
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from prompt_store.adapters import Adapter, AdapterLimits
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.lora.base_copies import tensor_digest
from prompt_store.files.validation import validate
from prompt_store.types import BaseModelSpec, ModuleShape, PeftType, TensorData
from prompt_store.types import TaskType as Task
from tests.prompt_store.conftest import LLAMA_SHAPE

LLAMA = LlamaConfig(
    **LLAMA_SHAPE,
    tie_word_embeddings=False,
    label2id={"a": 0, "b": 1, "c": 2},
    id2label={0: "a", 1: "b", 2: "c"},
)
PREFIX = "base_model.model."
MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{MODULE}.lora_A.weight", f"{PREFIX}{MODULE}.lora_B.weight"
FIELDS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


TENSORS = {A: ones(4, 32), B: ones(32, 4)}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA)


@pytest.fixture(scope="module")
def base(model: Any) -> BaseModelSpec:
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            modules[name] = ModuleShape("linear", module.in_features, module.out_features)
        elif isinstance(module, nn.Embedding):
            modules[name] = ModuleShape("embedding", module.num_embeddings, module.embedding_dim)
        elif name.endswith("norm"):
            modules[name] = ModuleShape("linear", 32, 32, "it is no linear layer (LlamaRMSNorm)")
    digests = {
        name: hashlib.sha256(model.get_parameter(name).detach().numpy().tobytes()).hexdigest()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    return BaseModelSpec("org/tiny", 32, 2, 2, 8, 64, "float32", modules=modules, digests=digests)


def check(base: BaseModelSpec, fields: dict[str, Any], tensors: dict[str, Any], **options: Any) -> Adapter:
    checked = validate(json.dumps(fields).encode(), save(tensors), base, require_same_base=True, **options)
    assert isinstance(checked, Adapter)
    return checked


def refused(base: BaseModelSpec, fields: dict[str, Any], tensors: dict[str, Any], **options: Any) -> list[Fault]:
    with pytest.raises(InvalidPromptError) as caught:
        check(base, fields, tensors, **options)
    return list(caught.value.faults)


CONFIGS: dict[str, PeftConfig] = {
    "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM),
    "all-linear": LoraConfig(
        r=4, use_rslora=True, target_modules="all-linear", rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3}
    ),
    "whole": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "bias": LoraConfig(r=2, lora_bias=True, target_modules=["o_proj"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["k_proj", "up_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
EXPECTED: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "attention": (4, 4, 2 * (2 * 4 * 32 + 4 * (32 + 16)), ("q_proj", "v_proj")),
    "bias": (2, 2, 2 * (2 * 2 * 32 + 32), ("o_proj",)),
    "ia3": (0, 6, 2 * (16 + 16 + 48), ("down_proj", "k_proj", "v_proj")),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers", "ignore:.*no bias", "ignore:.*invalid shape")
def test_adapters_of_peft_are_accepted(name: str, base: BaseModelSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(LLAMA)
    fresh.config._name_or_path = fresh.name_or_path = ""
    get_peft_model(fresh, CONFIGS[name]).save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    for given in (weights, weights.read_bytes()):
        config = (tmp_path / "adapter_config.json").read_bytes()
        adapter = validate(config, given, base, require_same_base=True)
        assert isinstance(adapter, Adapter)
        assert adapter.peft_type is (PeftType.IA3 if name == "ia3" else PeftType.LORA)
        assert (adapter.task_type, adapter.num_labels, adapter.dtype) == ("CAUSAL_LM", None, "F32")
        found = (adapter.rank, len(adapter.modules), adapter.num_parameters, adapter.targets)
        assert found == EXPECTED.get(name, found)
    if name == "whole":  # the copies are the base's own, unless it has other embeddings
        with pytest.raises(InvalidPromptError) as caught:
            validate(config, weights, replace(base, digests={"lm_head.weight": "0" * 64}), require_same_base=True)
        assert [fault.code for fault in caught.value.faults] == ["replaces_base"] * 2
        assert all("save_embedding_layers=False" in fault.message for fault in caught.value.faults)


def test_a_classifier_is_accepted_with_its_head(base: BaseModelSpec, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_config(LLAMA)
    classifier.config._name_or_path = classifier.name_or_path = ""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    get_peft_model(classifier, config).save_pretrained(str(tmp_path))
    data = (tmp_path / "adapter_config.json").read_bytes()
    weights = tmp_path / "adapter_model.safetensors"
    adapter = validate(data, weights, base, require_same_base=True)
    assert isinstance(adapter, Adapter)
    assert (adapter.task_type, adapter.num_labels, len(adapter.modules)) == ("SEQ_CLS", 3, 2)
    assert not any("score" in tensor for module in adapter.modules for tensor in module.tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_copies_are_compared_in_the_serving_dtype(dtype: str) -> None:
    weight = torch.randn(3000, 700) * torch.logspace(-9, 4, 700)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1.00390625, 65519.0])
    served = getattr(torch, dtype)
    expected = hashlib.sha256(weight.to(served).view(torch.uint8).numpy().tobytes()).hexdigest()
    stored = TensorData("F32", tuple(weight.shape), weight.numpy().tobytes())
    assert tensor_digest(stored, dtype) == expected
    halves = weight.to(torch.bfloat16)
    stored = TensorData("BF16", tuple(weight.shape), halves.view(torch.uint8).numpy().tobytes())
    expected = hashlib.sha256(halves.to(served).view(torch.uint8).numpy().tobytes()).hexdigest()
    assert tensor_digest(stored, dtype) == expected


@pytest.mark.parametrize(
    ("fields", "tensors", "code", "message"),
    [
        ({}, {A: ones(4, 31)}, "shape_mismatch", "[rank, 32] is needed"),
        ({}, {B: ones(30, 4)}, "shape_mismatch", "[32, rank] is needed"),
        ({"lora_bias": True}, {f"{PREFIX}{MODULE}.lora_B.bias": ones(5)}, "shape_mismatch", "[5]"),
        ({}, {A: ones(4, 32, dtype=np.float64)}, "unsupported_dtype", "F64"),
        ({}, {A: ones(4, 32, dtype=np.int8)}, "unsupported_dtype", "I8"),
        ({}, {A: np.full((4, 32), np.nan, np.float32)}, "non_finite_values", "128 NaN"),
        ({}, {A: np.full((4, 32), np.inf, np.float16)}, "non_finite_values", "128 NaN"),
        ({"lora_alpha": 1e308}, {}, "dtype_overflow", "scale"),
        ({}, {f"{PREFIX}model.norm.weight": ones(32)}, "replaces_base", "all requests share"),
        ({}, {f"{PREFIX}lm_head.weight": ones(60, 32)}, "replaces_base", "save_embedding_layers=False"),
        ({}, {f"{PREFIX}lm_head.weight": ones(60, 32, dtype=np.int8)}, "replaces_base", "drop-base-layers"),
        ({}, {f"{PREFIX}model.embed_tokens.base_layer.weight": ones(60, 32)}, "replaces_base", "--drop-base-layers"),
        ({}, {f"{PREFIX}score.weight": ones(3, 32)}, "unexpected_tensor", "task type SEQ_CLS"),
        ({"task_type": "SEQ_CLS"}, {}, "missing_tensor", "base_model.model.score"),
        ({"task_type": "SEQ_CLS"}, {f"{PREFIX}score.weight": ones(3, 31)}, "shape_mismatch", "[labels, 32]"),
        ({"task_type": "TOKEN_CLS"}, {}, "unsupported_task_type", "TOKEN_CLS"),
        ({"base_model_name_or_path": "org/other"}, {}, "base_model_mismatch", "org/tiny"),
        ({}, {name.replace("q_proj", "norm"): tensor for name, tensor in TENSORS.items()}, "unknown_module", ""),
        ({}, {name.replace("layers.0.self_attn.q_proj", "norm"): tensor for name, tensor in TENSORS.items()},
         "unsupported_module", "no linear layer (LlamaRMSNorm)"),
        ({}, {name.replace(MODULE, "model.embed_tokens"): tensor for name, tensor in TENSORS.items()},
         "missing_tensor", "needs lora_embedding_A"),
        ({}, {f"{PREFIX}{MODULE.replace('q_proj', 'o_proj')}.lora_embedding_A": ones(4, 32),
              f"{PREFIX}{MODULE.replace('q_proj', 'o_proj')}.lora_embedding_B": ones(32, 4)},
         "missing_tensor", "is a linear layer, and needs lora_A"),
    ],
)  # fmt: skip
def test_faults(
    base: BaseModelSpec, fields: dict[str, Any], tensors: dict[str, Any], code: str, message: str
) -> None:
    faults = refused(base, FIELDS | fields, TENSORS | tensors)
    assert {fault.code for fault in faults} == {code}
    assert message in faults[0].message


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("vision.model.layers.0.self_attn.q_proj", "without the prefix 'vision.' it would be 'model.layers.0.self"),
        ("layers.1.mlp.up_proj", "with the prefix 'model.' it would be 'model.layers.1.mlp.up_proj'"),
        ("model.layers.7.self_attn.q_proj", "it has 2 modules like it, such as 'model.layers.1.self_attn.q_proj'"),
        ("model.layers.1.self_attn.query", "the nearest is 'model.layers.1.self_attn."),
        ("model.layers.1.attn.v_proj", "the nearest is 'model.layers.1.self_attn.v_proj'"),
        ("xyz", "does not have"),
    ],
)
def test_the_nearest_module_is_named(base: BaseModelSpec, module: str, hint: str) -> None:
    (fault,) = refused(base, FIELDS, {name.replace(MODULE, module): tensor for name, tensor in TENSORS.items()})
    assert fault.code == "unknown_module"
    assert hint in fault.message


def test_limits_of_the_operator(base: BaseModelSpec) -> None:
    assert check(base, FIELDS, TENSORS, limits=AdapterLimits(4, 1024)).num_parameters == 256
    (fault,) = refused(base, FIELDS, TENSORS, limits=AdapterLimits(3))
    assert (fault.code, "--max-adapter-rank" in fault.message) == ("rank_too_large", True)
    (fault,) = refused(base, FIELDS, TENSORS, limits=AdapterLimits(4, 1023))
    assert (fault.code, "1024 bytes in float32" in fault.message) == ("adapter_too_large", True)
    half = replace(base, dtype="bfloat16")
    assert check(half, FIELDS, TENSORS, limits=AdapterLimits(4, 512)).rank == 4
    (fault,) = refused(replace(base, dtype="float16"), FIELDS | {"lora_alpha": 300_000}, TENSORS)
    assert (fault.code, "the scale 75000" in fault.message) == ("dtype_overflow", True)


def test_a_server_without_adapters_says_why(base: BaseModelSpec) -> None:
    (fault,) = refused(replace(base, adapters_off="a product is not exact"), FIELDS, TENSORS)
    assert (fault.code, fault.message.endswith("adapters: a product is not exact")) == ("adapters_off", True)
    (fault,) = refused(replace(base, modules={}), FIELDS, TENSORS)
    assert fault.code == "adapters_off"


@pytest.mark.parametrize(
    ("fields", "tensors", "part", "named"),
    [
        ({"lora_bias": True}, TENSORS | {f"{PREFIX}{MODULE}.lora_B.bias": ones(32)}, "bias", "lora_bias"),
        ({"use_dora": True}, TENSORS | {f"{PREFIX}{MODULE}.lora_magnitude_vector": ones(32)}, "magnitude", "DoRA"),
        ({"peft_type": "IA3"}, {f"{PREFIX}{MODULE}.ia3_l": ones(32, 1)}, "gain", "IA3"),
    ],
)
def test_parts_that_the_engine_does_not_apply_are_refused(
    base: BaseModelSpec, fields: dict[str, Any], tensors: dict[str, Any], part: str, named: str
) -> None:
    assert part in check(base, FIELDS | fields, tensors).modules[0].tensors
    (fault,) = refused(replace(base, adapter_parts=("A", "B")), FIELDS | fields, tensors)
    assert fault.code == "unsupported_variant"
    assert named in fault.message


def test_faults_of_both_files_are_reported_together(base: BaseModelSpec) -> None:
    fields = FIELDS | {"bias": "all", "base_model_name_or_path": "org/other", "rank_pattern": {"(": 1}}
    faults = refused(base, fields, {A: ones(4, 30), f"{PREFIX}x.lora_A.weight": ones(4, 1)})
    assert {fault.code for fault in faults} == {
        "replaces_base", "base_model_mismatch", "unsafe_pattern", "missing_tensor", "shape_mismatch", "unknown_module"
    }  # fmt: skip
    with pytest.raises(InvalidPromptError) as caught:
        validate(json.dumps(fields).encode(), b"PK\x03\x04", base, require_same_base=True)
    codes = {fault.code for fault in caught.value.faults}
    assert codes == {"replaces_base", "base_model_mismatch", "unsafe_pattern", "pickle_file"}


def test_a_missing_task_is_generation_unless_the_uploader_states_another(base: BaseModelSpec) -> None:
    fields = {key: value for key, value in FIELDS.items() if key != "task_type"}
    assert check(base, fields, TENSORS).task_type == "CAUSAL_LM"
    assert check(base, fields, TENSORS).overrides == {}
    head = {f"{PREFIX}score.weight": ones(2, 32)}
    assert [fault.code for fault in refused(base, fields, TENSORS | head)] == ["unexpected_tensor"]
    adapter = check(base, fields, TENSORS | head, task_type=Task.SEQ_CLS)
    assert (adapter.task_type, adapter.num_labels, adapter.overrides) == ("SEQ_CLS", 2, {"task_type": "SEQ_CLS"})
    faults = refused(base, FIELDS, TENSORS | head, task_type=Task.SEQ_CLS)
    assert [fault.code for fault in faults] == ["task_type_conflict", "unexpected_tensor"]
