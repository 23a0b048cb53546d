"""Files of other tools and other releases: which are accepted, and the advice of a rejection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import save
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.validation import validate
from prompt_store.types import BaseModelSpec, SoftPrompt, TaskType

BASE = BaseModelSpec("org/tiny", 32, 2, 2, 8, 64, "float32")
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
CONVERTED = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
ROWS = np.ones((3, 32), np.float32)
HEAD: dict[str, Any] = {"base_model.score.weight": np.ones((2, 32), np.float32)}


def check(
    config: dict[str, object], *, same: bool = True, task: TaskType | None = None, **more: np.ndarray
) -> SoftPrompt:
    weights = save({"prompt_embeddings": ROWS, **more})
    checked = validate(json.dumps(config).encode(), weights, BASE, require_same_base=same, task_type=task)
    assert isinstance(checked, SoftPrompt)
    return checked


def refused(*arguments: Any, **options: Any) -> list[Fault]:
    try:
        check(*arguments, **options)
    except InvalidPromptError as error:
        return list(error.faults)
    return []


def faults(*arguments: Any, **options: Any) -> list[tuple[str, str | None]]:
    return [(fault.code, fault.field) for fault in refused(*arguments, **options)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.config._name_or_path = model.name_or_path = ""
    return model


def validated(folder: Path) -> list[Fault]:
    try:
        config = (folder / "adapter_config.json").read_bytes()
        validate(config, folder / "adapter_model.safetensors", BASE, require_same_base=True)
    except InvalidPromptError as error:
        return list(error.faults)
    return []


def test_embeddings_that_peft_saves_are_rejected_with_advice(model: PreTrainedModel, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trained = get_peft_model(model, config)
    trained.save_pretrained(str(tmp_path / "with"), save_embedding_layers=True)
    (fault,) = validated(tmp_path / "with")
    assert fault.code == "unexpected_tensor"
    for part in ("embed_tokens.weight", "lm_head.weight", "60 rows", "save_embedding_layers=False"):
        assert part in fault.message
    trained.save_pretrained(str(tmp_path / "without"), save_embedding_layers=False)
    assert validated(tmp_path / "without") == []


@pytest.mark.parametrize(
    "name",
    [
        "base_model.transformer.wte.weight",
        "base_model.gpt_neox.embed_in.weight",
        "base_model.embed_out.weight",
        "base_model.transformer.word_embeddings.weight",
        "base_model.model.decoder.embed_tokens.weight",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "lm_head.weight",
    ],
)
def test_the_embeddings_of_every_family_are_known(name: str) -> None:
    (fault,) = refused(CONFIG, **{name: np.ones((60, 32), np.float32)})
    assert "save_embedding_layers=False" in fault.message


def test_other_tensors_are_reported_one_by_one() -> None:
    more = {f"other.{index:02}": np.ones(1, np.float32) for index in range(10)}
    found = refused(CONFIG, **{"base_model.lm_head.weight": np.ones((60, 32), np.float32)}, **more)
    assert len(found) == 1 + 8 + 1
    assert "save_embedding_layers" in found[0].message
    assert "2 more tensors" in found[-1].message


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        (
            "SEQ_CLS",
            "base_model.score.modules_to_save.default.weight",
            "it saves the trained head as base_model.score.",
        ),
        ("SEQ_CLS", "score.weight", "it saves the trained head as base_model.score.weight"),
        ("SEQ_CLS", "base_model.model.classifier.bias", "it saves the trained head as base_model.classifier.bias"),
        ("SEQ_CLS", "base_model.score.original_module.weight", "it is the untrained head; leave it out"),
        ("CAUSAL_LM", "base_model.score.weight", "a classification head requires the task type SEQ_CLS"),
        ("CAUSAL_LM", "base_model.norm.weight", "it would replace weights of the shared base model"),
    ],
)
def test_a_head_by_another_name_is_reported_with_the_right_name(task: str, name: str, words: str) -> None:
    found = refused(CONFIG | {"task_type": task}, **{name: np.ones((2, 32), np.float32)})
    told = next(fault for fault in found if fault.field == name)
    assert told.code == "unexpected_tensor"
    assert words in told.message


def test_a_lora_has_one_fault_that_names_it(model: PreTrainedModel, tmp_path: Path) -> None:
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(str(tmp_path))
    (fault,) = validated(tmp_path)
    assert fault.code == "adapters_off"
    assert "this server serves no LoRA or IA3 adapters" in fault.message


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA tensors"),
        ("prompt_encoder.default.embedding.weight", "a training state"),
        ("model.layers.0.mlp.up_proj.weight", "weights of a whole model"),
        ("transformer.h.0.attn.c_attn.weight", "weights of a whole model"),
    ],
)
def test_a_file_without_rows_is_reported_with_a_guess(name: str, guess: str) -> None:
    weights = save({name: np.ones((2, 2), np.float32)})
    with pytest.raises(InvalidPromptError) as caught:
        validate(json.dumps(CONFIG).encode(), weights, BASE, require_same_base=True)
    missing = next(fault for fault in caught.value.faults if fault.code == "missing_tensor")
    assert guess in missing.message


def test_the_configuration_of_a_model_is_recognised() -> None:
    found = refused({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32})
    assert "the configuration of a whole model" in found[0].message


def test_the_uploader_states_a_missing_task() -> None:
    prompt = check(CONVERTED, task=TaskType.CAUSAL_LM)
    assert (prompt.task_type, prompt.overrides) == ("CAUSAL_LM", {"task_type": "CAUSAL_LM"})
    prompt = check(CONVERTED | {"task_type": None}, task=TaskType.SEQ_CLS, **HEAD)
    assert (prompt.task_type, prompt.num_labels) == ("SEQ_CLS", 2)
    assert check(CONFIG, task=TaskType.CAUSAL_LM).overrides == {}


def test_a_missing_task_is_reported_with_advice() -> None:
    (fault,) = refused(CONVERTED)
    assert (fault.code, fault.field) == ("unsupported_task_type", "task_type")
    assert "upload with task_type=CAUSAL_LM (prelude push --task-type CAUSAL_LM)" in fault.message


@pytest.mark.parametrize(
    ("config", "said", "more", "want"),
    [
        (CONFIG, TaskType.SEQ_CLS, {}, [("task_type_conflict", "task_type")]),
        (CONVERTED | {"task_type": "SEQ_2_SEQ_LM"}, TaskType.CAUSAL_LM, {}, [("task_type_conflict", "task_type")]),
        (CONVERTED | {"task_type": 3}, TaskType.CAUSAL_LM, {}, [("task_type_conflict", "task_type")]),
        (CONVERTED, TaskType.CAUSAL_LM, HEAD, [("unexpected_tensor", "base_model.score.weight")]),
        (CONVERTED, TaskType.SEQ_CLS, {}, [("missing_tensor", "base_model.score.weight")]),
        (
            CONVERTED | {"modules_to_save": ["classifier", "score"]},
            TaskType.CAUSAL_LM,
            {},
            [("task_type_conflict", "modules_to_save")],
        ),
        (
            CONVERTED | {"auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}},
            TaskType.CAUSAL_LM,
            {},
            [("task_type_conflict", "auto_mapping")],
        ),
        (
            CONVERTED | {"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}},
            TaskType.SEQ_CLS,
            HEAD,
            [("task_type_conflict", "auto_mapping")],
        ),
        (
            CONVERTED | {"num_transformer_submodules": 2},
            TaskType.CAUSAL_LM,
            {},
            [("unsupported_submodules", "num_transformer_submodules")],
        ),
        (
            CONVERTED | {"peft_type": "CPT"},
            TaskType.SEQ_CLS,
            HEAD,
            [("unsupported_task_type", "task_type")],
        ),
    ],
)
def test_files_that_contradict_the_stated_task_are_rejected(
    config: dict[str, Any], said: TaskType, more: dict[str, Any], want: list[tuple[str, str]]
) -> None:
    assert faults(config, task=said, **more) == want


@pytest.mark.parametrize(
    "mapping",
    [
        None,
        [],
        {},
        {"base_model_class": None},
        {"base_model_class": "LlamaForCausalLM"},
        {"base_model_class": "Gemma3ForConditionalGeneration"},
        {"base_model_class": "Own"},
    ],
)
@pytest.mark.parametrize("saved", [None, [], "score", ["other"]])
def test_fields_that_do_not_contradict_the_stated_task_are_ignored(
    mapping: list[Any] | dict[str, Any] | None, saved: str | list[Any] | None
) -> None:
    config = CONVERTED | {"auto_mapping": mapping, "modules_to_save": saved}
    assert faults(config, task=TaskType.CAUSAL_LM) == []


def test_an_accepted_other_base_is_recorded() -> None:
    other = CONFIG | {"base_model_name_or_path": "org/large"}
    assert check(other, same=False).overrides == {"allow_other_base": True}
    assert check(CONFIG | {"base_model_name_or_path": "org/tiny"}, same=False).overrides == {}
    assert faults(other) == [("base_model_mismatch", "base_model_name_or_path")]
