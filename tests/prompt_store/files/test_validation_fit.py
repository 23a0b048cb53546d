"""Whether a soft prompt fits its base, and the messages if it does not."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

import prompt_store
from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files import validation
from prompt_store.files.validation import validate
from prompt_store.types import BaseModelSpec, SoftPrompt

BASE = BaseModelSpec("org/tiny", 32, 2, 2, 8, 64, "float32")
EMBEDS = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PREFIX = EMBEDS | {"peft_type": "PREFIX_TUNING"}


def faults(
    config: dict[str, object], rows: np.ndarray, base: BaseModelSpec = BASE, *, same: bool = False
) -> list[Fault]:
    weights = save({"prompt_embeddings": rows})
    try:
        validate(json.dumps(config).encode(), weights, base, require_same_base=same)
    except InvalidPromptError as error:
        return list(error.faults)
    return []


def codes(*arguments: Any, **options: Any) -> list[str]:
    return [fault.code for fault in faults(*arguments, **options)]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_what_peft_writes_fits_and_is_read_value_for_value(
    peft_folders: dict[str, Path], base: BaseModelSpec
) -> None:
    for name, folder in peft_folders.items():
        config = (folder / "adapter_config.json").read_bytes()
        path = folder / "adapter_model.safetensors"
        expected = load(path.read_bytes())["prompt_embeddings"]
        for weights in (path, path.read_bytes()):
            prompt = validate(config, weights, base, require_same_base=False)
            assert isinstance(prompt, SoftPrompt)
            assert bytes(prompt.prompt_embeddings.data) == expected.tobytes()
            assert prompt.prompt_embeddings.shape == expected.shape
            assert prompt.num_tasks == (3 if name == "multitask" else None)
            assert prompt.num_labels == (4 if name == "head" else None)


def test_wrong_hidden_size_of_embeddings() -> None:
    (fault,) = faults(EMBEDS, ones(3, 48))
    assert (fault.code, fault.file, fault.field) == (
        "shape_mismatch",
        "adapter_model.safetensors",
        "prompt_embeddings",
    )
    assert "width 48" in fault.message
    assert "width 32" in fault.message


@pytest.mark.parametrize(
    ("num_layers", "width", "want"),
    [
        (2, 64, []),
        (None, 64, []),
        (3, 96, ["layer_count_mismatch"]),
        (None, 96, ["layer_count_mismatch"]),
        (2, 128, ["shape_mismatch"]),  # 2 layers of twice the heads
        (None, 65, ["shape_mismatch"]),
        (4, 64, ["layer_count_mismatch", "shape_mismatch"]),  # the right width, but of 4 layers with half the heads
        (3, 192, ["layer_count_mismatch", "shape_mismatch"]),
        (10**400, 64, ["layer_count_mismatch", "shape_mismatch"]),
    ],
)
def test_wrong_layers_and_wrong_heads_of_a_prefix_are_distinguished(
    num_layers: int | None, width: int, want: list[Any]
) -> None:
    assert codes(PREFIX | {"num_layers": num_layers}, ones(3, width)) == want


def test_messages_on_a_prefix_say_where_the_numbers_come_from() -> None:
    (layers,) = faults(PREFIX | {"num_layers": 3}, ones(3, 96))
    assert "for 3 layers, but 'org/tiny' has 2" in layers.message
    assert "width 96" in layers.message
    assert "64 (2 layers x 2 x 2 key/value heads x head_dim 8)" in layers.message
    (heads,) = faults(PREFIX | {"num_layers": 2}, ones(3, 128))
    assert "32 for the keys of each layer where 16 are needed" in heads.message


def test_peft_ignores_the_head_fields_of_a_prefix() -> None:
    assert codes(PREFIX | {"token_dim": 32, "num_attention_heads": 4}, ones(3, 64)) == []


def test_token_dim_must_be_the_width_of_the_rows() -> None:
    assert codes(EMBEDS | {"token_dim": 32}, ones(3, 32)) == []
    assert codes(EMBEDS | {"token_dim": 48}, ones(3, 32)) == ["inconsistent_token_dim"]


@pytest.mark.parametrize("shape", [(96,), (3, 32, 1), ()])
def test_rows_are_a_matrix(shape: tuple[int, ...]) -> None:
    assert codes(EMBEDS, ones(*shape)) == ["shape_mismatch"]


def test_no_rows() -> None:
    assert set(codes(EMBEDS, ones(0, 32))) == {"shape_mismatch", "num_virtual_tokens_mismatch"}


@pytest.mark.parametrize("stated", [2, 4, 10**12, 10**400])
def test_the_configuration_must_agree_with_the_rows(stated: int) -> None:
    (fault,) = faults(EMBEDS | {"num_virtual_tokens": stated}, ones(3, 32))
    assert fault.code == "num_virtual_tokens_mismatch"
    assert "3 rows" in fault.message


@pytest.mark.parametrize(("rows", "want"), [(62, []), (63, ["context_exceeded"]), (64, ["context_exceeded"])])
def test_the_context_has_room_for_text_and_a_new_token(rows: int, want: list[Any]) -> None:
    assert codes(EMBEDS | {"num_virtual_tokens": rows}, ones(rows, 32)) == want


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.bool_, np.int64])
def test_other_dtypes(dtype: npt.DTypeLike) -> None:
    (fault,) = faults(EMBEDS, np.ones((3, 32), dtype))
    assert fault.code == "unsupported_dtype"
    assert "F32, F16, BF16" in fault.message
    assert ("re-save as float32" in fault.message) == (dtype is np.float64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_is_reported_with_its_place(value: float) -> None:
    rows = ones(3, 32)
    rows[1, 5:7] = value
    (fault,) = faults(EMBEDS, rows)
    assert fault.code == "non_finite_values"
    assert "2 NaN or infinite values, the first at row 1, column 5" in fault.message


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_overflow_in_the_serving_dtype(dtype: str, value: float) -> None:
    rows = ones(3, 32)
    rows[2, 1] = -value
    assert codes(EMBEDS, rows) == []
    (fault,) = faults(EMBEDS, rows, dataclasses.replace(BASE, dtype=dtype))
    assert fault.code == "dtype_overflow"
    assert dtype in fault.message
    assert "row 2, column 1" in fault.message


def test_tensors_that_peft_would_load_over_the_base() -> None:
    extra = {f"base_model.layer_{index:02}.weight": ones(1) for index in range(12)}
    weights = save({"prompt_embeddings": ones(3, 32), **extra})
    with pytest.raises(InvalidPromptError) as caught:
        validate(json.dumps(EMBEDS).encode(), weights, BASE, require_same_base=False)
    found = caught.value.faults
    assert {fault.code for fault in found} == {"unexpected_tensor"}
    assert [fault.field for fault in found] == [f"base_model.layer_{index:02}.weight" for index in range(8)] + [None]
    assert "4 more tensors" in found[-1].message


def test_missing_tensor() -> None:
    with pytest.raises(InvalidPromptError) as caught:
        validate(json.dumps(EMBEDS).encode(), save({"other": ones(3, 32)}), BASE, require_same_base=False)
    assert [fault.code for fault in caught.value.faults] == ["unexpected_tensor", "missing_tensor"]


@pytest.mark.parametrize("name", ["org/tiny", "other-org/tiny", "tiny", "/models/tiny/", "org/Tiny", None, ""])
def test_the_same_base_by_another_path_or_not_named(name: str | None) -> None:
    assert codes(EMBEDS | {"base_model_name_or_path": name}, ones(3, 32), same=True) == []


def test_the_base_by_another_of_its_names() -> None:
    weights = save({"prompt_embeddings": ones(3, 32)})
    config = json.dumps(EMBEDS | {"base_model_name_or_path": "hub/tiny-1b"}).encode()
    validate(config, weights, replace(BASE, other_names=("org/tiny-1b",)), require_same_base=True)


@pytest.mark.parametrize(
    "name",
    ["C:\\models\\tiny", "/hub/models--org--tiny/snapshots/0123456789abcdef", "https://hub/org/tiny/tree/main"],
)
def test_the_same_base_by_the_forms_that_other_machines_use(name: str) -> None:
    assert codes(EMBEDS | {"base_model_name_or_path": name}, ones(3, 32), same=True) == []


def test_a_base_served_from_the_hubs_cache_is_its_hub_id() -> None:
    config = json.dumps(EMBEDS | {"base_model_name_or_path": "hub/tiny-1b"}).encode()
    base = replace(BASE, name="x", other_names=("/hub/models--hub--tiny-1b/snapshots/0123456789abcdef",))
    validate(config, save({"prompt_embeddings": ones(3, 32)}), base, require_same_base=True)


def test_a_served_name_without_a_model_matches_nothing() -> None:
    base = replace(BASE, other_names=(".", ".."))
    config = json.dumps(EMBEDS | {"base_model_name_or_path": "."}).encode()
    with pytest.raises(InvalidPromptError, match="allow_other_base=true"):
        validate(config, save({"prompt_embeddings": ones(3, 32)}), base, require_same_base=True)


@pytest.mark.parametrize("name", ["org/large", "tiny/large"])
def test_another_base_is_rejected_only_if_the_server_requires_its_own(name: str) -> None:
    config = EMBEDS | {"base_model_name_or_path": name}
    assert codes(config, ones(3, 32)) == []
    assert codes(config, ones(3, 32), same=True) == ["base_model_mismatch"]


def test_all_faults_are_reported_together() -> None:
    config = {"peft_type": "PREFIX_TUNING", "task_type": "TOKEN_CLS", "num_virtual_tokens": 4, "num_layers": 3}
    config["base_model_name_or_path"] = "org/large"
    assert set(
        codes(config | {"num_transformer_submodules": 2}, np.full((70, 65), np.nan, np.float32), same=True)
    ) == {
        "unsupported_task_type",
        "unsupported_submodules",
        "base_model_mismatch",
        "layer_count_mismatch",
        "shape_mismatch",
        "num_virtual_tokens_mismatch",
        "context_exceeded",
        "non_finite_values",
    }


def test_weights_are_checked_even_if_the_configuration_is_unreadable() -> None:
    weights = save({"prompt_embeddings": np.full((70, 32), np.nan, np.float32)})
    with pytest.raises(InvalidPromptError) as caught:
        validate(b"{", weights, BASE, require_same_base=True)
    assert {fault.code for fault in caught.value.faults} == {"invalid_json", "context_exceeded", "non_finite_values"}


def test_the_table_of_codes_is_complete() -> None:
    documented = set(re.findall(r"^``(\w+)`` ", validation.__doc__, re.MULTILINE))
    sources = [path.read_text() for path in Path(prompt_store.__file__).parent.rglob("*.py")]
    used = {
        code
        for source in sources
        for code in re.findall(r"(?:[Ff]aults?|_invalid|refused|\.add|_of|note|report)\(\s*\"(\w+)\"", source)
    }
    # These are faults of the request that carries the files.
    used -= {"duplicate_file", "incomplete_file", "missing_file", "unexpected_file"}
    assert used == documented


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 70), st.integers(0, 200), st.none() | st.integers(1, 10), st.sampled_from([EMBEDS, PREFIX]))
def test_any_shape_is_accepted_exactly_if_it_fits(
    num_rows: int, width: int, num_layers: int | None, config: dict[str, Any]
) -> None:
    config = config | {"num_virtual_tokens": max(1, num_rows), "num_layers": num_layers}
    is_prefix = config["peft_type"] == "PREFIX_TUNING"
    fits = (
        width == (64 if is_prefix else 32) and 1 <= num_rows <= 62 and not (is_prefix and num_layers not in (None, 2))
    )
    assert (faults(config, ones(num_rows, width)) == []) == fits
