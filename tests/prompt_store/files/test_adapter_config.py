"""The parser of ``adapter_config.json``: every fault has its code, and unknown fields are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files.adapter_config import (
    MAX_CONFIG_BYTES,
    MAX_CONFIG_DEPTH,
    AdapterConfig,
    parse_adapter_config,
    read_config,
)
from prompt_store.types import PeftType, TaskType

CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


def config_of(**changes: Any) -> dict[str, object]:
    return {**CONFIG, **changes}


def faults_of(config: dict[str, object]) -> list[Fault]:
    return parse_adapter_config(json.dumps(config).encode())[1]


def codes(config: dict[str, object]) -> list[tuple[str, str | None]]:
    return [(fault.code, fault.field) for fault in faults_of(config)]


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(InvalidPromptError) as caught:
        read_config(data)
    (fault,) = caught.value.faults
    return fault.code, fault.message


@pytest.mark.parametrize(
    ("name", "peft_type", "num_virtual_tokens"),
    [
        ("prompt_tuning", PeftType.PROMPT_TUNING, 6),
        ("p_tuning", PeftType.P_TUNING, 5),
        ("prefix_tuning", PeftType.PREFIX_TUNING, 7),
        ("prefix_projected", PeftType.PREFIX_TUNING, 4),
        ("p_tuning_lstm", PeftType.P_TUNING, 3),
        ("multitask", PeftType.MULTITASK_PROMPT_TUNING, 5),
        ("cpt", PeftType.CPT, 4),
        ("cartridge", PeftType.CARTRIDGE, 6),
        ("head", PeftType.PROMPT_TUNING, 3),
    ],
)
def test_reads_what_peft_writes(
    peft_folders: dict[str, Path], name: str, peft_type: PeftType, num_virtual_tokens: int
) -> None:
    data = (peft_folders[name] / "adapter_config.json").read_bytes()
    config, faults = parse_adapter_config(data)
    assert faults == []
    assert (config.peft_type, config.num_virtual_tokens) == (peft_type, num_virtual_tokens)
    assert config.task_type is (TaskType.SEQ_CLS if name == "head" else TaskType.CAUSAL_LM)
    assert (config.num_tasks, config.num_ranks) == ((3, 2) if name == "multitask" else (None, None))
    assert config.fields == json.loads(data)


def test_a_configuration_is_frozen() -> None:
    config, _ = parse_adapter_config(json.dumps(CONFIG).encode())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_virtual_tokens = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "not valid JSON: it begins with a byte order mark"),
        ("{}".encode("utf-16"), "it is UTF-16"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' appears twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * (MAX_CONFIG_DEPTH + 1) + b"]" * (MAX_CONFIG_DEPTH + 1) + b"}", "nested deeper"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
    ],
)
def test_json_that_is_not_strict_is_rejected(data: bytes, message: str) -> None:
    code, text = refusal(data)
    assert code == "invalid_json"
    assert message in text


def test_a_large_configuration_is_rejected() -> None:
    padded = b"{" + b" " * (MAX_CONFIG_BYTES - 2) + b"}"
    assert read_config(padded) == {}
    assert refusal(padded + b" ")[0] == "config_too_large"


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"peft_type": None}, "missing_field", "peft_type"),
        ({"peft_type": 3}, "invalid_field", "peft_type"),
        ({"peft_type": "LOHA"}, "unsupported_peft_type", "peft_type"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 0}, "invalid_field", "num_tasks"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_ranks": "1"}, "invalid_field", "num_ranks"),
        ({"peft_type": "CPT", "task_type": "SEQ_CLS"}, "unsupported_task_type", "task_type"),
        ({"peft_type": "prompt_tuning"}, "unsupported_peft_type", "peft_type"),
        ({"task_type": None}, "unsupported_task_type", "task_type"),
        ({"task_type": "TOKEN_CLS"}, "unsupported_task_type", "task_type"),
        ({"task_type": ["CAUSAL_LM"]}, "invalid_field", "task_type"),
        ({"num_virtual_tokens": None}, "missing_field", "num_virtual_tokens"),
        ({"num_virtual_tokens": 0}, "invalid_field", "num_virtual_tokens"),
        ({"num_virtual_tokens": -(10**4000)}, "invalid_field", "num_virtual_tokens"),
        ({"num_virtual_tokens": True}, "invalid_field", "num_virtual_tokens"),
        ({"num_virtual_tokens": 3.0}, "invalid_field", "num_virtual_tokens"),
        ({"num_virtual_tokens": "3"}, "invalid_field", "num_virtual_tokens"),
        ({"num_layers": 0}, "invalid_field", "num_layers"),
        ({"token_dim": {}}, "invalid_field", "token_dim"),
        ({"num_attention_heads": "4"}, "invalid_field", "num_attention_heads"),
        ({"num_transformer_submodules": 2}, "unsupported_submodules", "num_transformer_submodules"),
        ({"num_transformer_submodules": True}, "unsupported_submodules", "num_transformer_submodules"),
        ({"base_model_name_or_path": 1}, "invalid_field", "base_model_name_or_path"),
        ({"base_model_name_or_path": "a\x00b"}, "invalid_field", "base_model_name_or_path"),
        ({"base_model_name_or_path": "\ud800"}, "invalid_field", "base_model_name_or_path"),
        ({"base_model_name_or_path": "a" * 1025}, "invalid_field", "base_model_name_or_path"),
    ],
)
def test_field_faults(changes: dict[str, object], code: str, field: str) -> None:
    assert codes(config_of(**changes)) == [(code, field)]


@pytest.mark.parametrize(
    ("peft_type", "reason"),
    [
        ("LOHA", "'LOHA' is an adapter that changes the model's weights; it is not served;"),
        ("OFT", "'OFT' is an adapter that turns the model's weights; it is not served;"),
        ("ADAPTION_PROMPT", "gated attention of its own"),
        ("prompt_tuning", "is not spelled as in PEFT (PROMPT_TUNING);"),
        ("NO_SUCH", "'NO_SUCH' is not a method that this server supports;"),
    ],
)
def test_other_methods_are_named_and_explained(peft_type: str, reason: str) -> None:
    (fault,) = faults_of(config_of(peft_type=peft_type))
    assert fault.code == "unsupported_peft_type"
    assert reason in fault.message
    assert fault.message.endswith(f"supported are {', '.join(PeftType)}")


def test_every_method_of_peft_is_served_or_explained() -> None:
    for peft_type in peft.PeftType:
        faults = faults_of(config_of(peft_type=peft_type.value))
        if peft_type.value in PeftType.__members__:
            assert faults == []
        else:
            assert "it is not served" in faults[0].message


@pytest.mark.parametrize(
    ("task_type", "reason"),
    [
        (None, "not 'missing or null': PEFT's own generate() ignores a prompt without a task type"),
        ("TOKEN_CLS", "not 'TOKEN_CLS': prompts for other tasks come with a head or an encoder"),
        ("SEQ_2_SEQ_LM", "not 'SEQ_2_SEQ_LM': prompts for other tasks come with a head or an encoder"),
    ],
)
def test_other_tasks_are_named_and_explained(task_type: str | None, reason: str) -> None:
    (fault,) = faults_of(config_of(task_type=task_type))
    assert f"task_type must be CAUSAL_LM or SEQ_CLS, {reason}" in fault.message


def test_fields_of_other_methods_are_ignored() -> None:
    assert codes(config_of(num_tasks="many", num_ranks=0, num_frozen_tokens=-1, cpt_token_ids=None)) == []


def test_an_empty_configuration_has_every_fault_at_once() -> None:
    assert codes({}) == [
        ("missing_field", "peft_type"),
        ("unsupported_task_type", "task_type"),
        ("missing_field", "num_virtual_tokens"),
    ]


def test_nothing_in_the_configuration_is_acted_on(tmp_path: Path) -> None:
    trap = tmp_path / "trap.bin"  # a path that is opened would be missed
    config = config_of(
        prompt_tuning_init="EXACT_SOURCE_TASK",
        prompt_tuning_init_state_dict_path=str(trap),
        auto_mapping={"base_model_class": "X", "parent_library": "no.such.library"},
        tokenizer_name_or_path="http://localhost:1/x",
        written_by_a_later_peft=[1, {"a": None}],
    )
    parsed, faults = parse_adapter_config(json.dumps(config).encode())
    assert faults == []
    assert parsed.fields == config


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_rejected(data: bytes) -> None:
    try:
        fields = read_config(data)
    except InvalidPromptError:
        assert parse_adapter_config(data)[1]
    else:
        assert parse_adapter_config(data)[0].fields == fields


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


FIELDS = [field.name for field in dataclasses.fields(AdapterConfig)] + [
    "auto_mapping", "modules_to_save", "num_transformer_submodules", "num_attention_heads", "architectures",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES | st.sampled_from([*PeftType, *TaskType, "LORA", 1, 3])),
    st.none() | st.sampled_from(TaskType),
)
@example({"modules_to_save": [{}, []], "task_type": None}, TaskType.CAUSAL_LM)
def test_any_values_are_a_configuration_or_faults(changes: dict[str, object], task_type: TaskType | None) -> None:
    data = json.dumps(config_of(**changes)).encode()
    config, faults = parse_adapter_config(data, task_type)
    is_adapter = config.peft_type in (PeftType.LORA, PeftType.IA3)
    required = (config.peft_type, config.task_type, 1 if is_adapter else config.num_virtual_tokens)
    assert faults or None not in required
    assert config.fields == json.loads(data)
    "".join(fault.message for fault in faults).encode()
