from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from prompt_store.errors import InvalidPromptError
from prompt_store.formats import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, config_faults, parse_soft_prompt, read_config
from prompt_store.types import PeftType

CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
WEIGHTS = save({"prompt_embeddings": np.ones((3, 8), np.float32)})


def config_of(**changes: object) -> dict[str, object]:
    return {**CONFIG, **changes}


def codes(config: dict[str, object]) -> list[tuple[str, str | None]]:
    return [(fault.code, fault.field) for fault in config_faults(config)]


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
    ],
)
def test_reads_what_peft_writes_value_for_value(peft_folders, name, peft_type, num_virtual_tokens):
    config = (peft_folders[name] / "adapter_config.json").read_bytes()
    path = peft_folders[name] / "adapter_model.safetensors"
    want = load(path.read_bytes())["prompt_embeddings"]
    for weights in (path, path.read_bytes()):
        prompt = parse_soft_prompt(config, weights)
        assert (prompt.peft_type, prompt.num_virtual_tokens) == (peft_type, num_virtual_tokens)
        assert bytes(prompt.prompt_embeddings.data) == want.tobytes()
        assert prompt.prompt_embeddings.shape == want.shape
        assert prompt.config == json.loads(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
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
def test_refuses_what_is_not_strict_json(data, message):
    code, text = refusal(data)
    assert code == "invalid_json"
    assert message in text


def test_refuses_a_large_configuration():
    padded = b"{" + b" " * (MAX_CONFIG_BYTES - 2) + b"}"
    assert read_config(padded) == {}
    assert refusal(padded + b" ")[0] == "config_too_large"


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"peft_type": None}, "missing_field", "peft_type"),
        ({"peft_type": 3}, "invalid_field", "peft_type"),
        ({"peft_type": "LORA"}, "unsupported_peft_type", "peft_type"),
        ({"peft_type": "CARTRIDGE"}, "unsupported_peft_type", "peft_type"),
        ({"peft_type": "prompt_tuning"}, "unsupported_peft_type", "peft_type"),
        ({"task_type": None}, "unsupported_task_type", "task_type"),
        ({"task_type": "SEQ_CLS"}, "unsupported_task_type", "task_type"),
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
def test_field_faults(changes, code, field):
    assert codes(config_of(**changes)) == [(code, field)]


def test_messages_name_what_was_found_and_what_is_supported():
    (lora,) = config_faults(config_of(peft_type="LORA"))
    assert "'LORA' is not a soft prompt" in lora.message
    assert "PROMPT_TUNING, P_TUNING, PREFIX_TUNING" in lora.message
    (later,) = config_faults(config_of(peft_type="CPT"))
    assert "'CPT' is not served yet" in later.message
    (task,) = config_faults(config_of(task_type="SEQ_CLS"))
    assert "CAUSAL_LM, not 'SEQ_CLS'" in task.message


def test_an_empty_configuration_has_every_fault_at_once():
    assert codes({}) == [
        ("missing_field", "peft_type"),
        ("unsupported_task_type", "task_type"),
        ("missing_field", "num_virtual_tokens"),
    ]


def test_faults_of_both_files_are_told_together():
    with pytest.raises(InvalidPromptError) as caught:
        parse_soft_prompt(b"{}", b"")
    assert {fault.file for fault in caught.value.faults} == {"adapter_config.json", "adapter_model.safetensors"}


def test_nothing_in_the_configuration_is_acted_on(tmp_path):
    trap = tmp_path / "trap.bin"  # a path that is opened would be missed
    config = config_of(
        prompt_tuning_init="EXACT_SOURCE_TASK",
        prompt_tuning_init_state_dict_path=str(trap),
        auto_mapping={"base_model_class": "X", "parent_library": "no.such.library"},
        tokenizer_name_or_path="http://localhost:1/x",
        written_by_a_later_peft=[1, {"a": None}],
    )
    prompt = parse_soft_prompt(json.dumps(config).encode(), WEIGHTS)
    assert prompt.config == config


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(data):
    try:
        config = read_config(data)
    except InvalidPromptError:
        return
    assert isinstance(config, dict)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*CONFIG, "num_layers", "token_dim", "base_model_name_or_path"]), VALUES))
def test_any_fields_are_taken_or_refused_in_printable_words(changes):
    config = config_of(**changes)
    try:
        parse_soft_prompt(json.dumps(config).encode(), WEIGHTS)
    except InvalidPromptError as error:
        str(error).encode()
