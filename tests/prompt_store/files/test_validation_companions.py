"""The other tensors (factors of a multitask prompt, a classification head), and float64."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from prompt_store.errors import Fault, InvalidPromptError
from prompt_store.files import numerics
from prompt_store.files.validation import validate
from prompt_store.store import PromptStore
from prompt_store.types import BaseModelSpec, SoftPrompt
from tests.prompt_store.conftest import Publish

BASE = BaseModelSpec("org/tiny", 32, 2, 2, 8, 64, "float32")
MULTITASK = {"peft_type": "MULTITASK_PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
HEAD = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 3}
ROWS, COLS, TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
WEIGHT, BIAS = "base_model.score.weight", "base_model.score.bias"


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def multitask(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = {ROWS: ones(3, 32), COLS: ones(4, 3, 2), TASK_ROWS: ones(4, 2, 32)} | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def with_head(*, labels: int = 2, module: str = "score") -> dict[str, np.ndarray]:
    return {ROWS: ones(3, 32), f"base_model.{module}.weight": ones(labels, 32)}


def check(
    config: dict[str, object], tensors: dict[str, np.ndarray], base: BaseModelSpec = BASE, **options: Any
) -> SoftPrompt:
    checked = validate(json.dumps(config).encode(), save(tensors), base, require_same_base=False, **options)
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


def test_the_number_of_tasks_is_that_of_the_factors() -> None:
    assert check(MULTITASK, multitask()).num_tasks == 4
    assert check(MULTITASK | {"num_tasks": 4, "num_ranks": 2}, multitask()).num_labels is None


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({COLS: None}, [("missing_tensor", COLS)]),
        ({COLS: None, TASK_ROWS: None}, [("missing_tensor", COLS), ("missing_tensor", TASK_ROWS)]),
        ({ROWS: None}, [("missing_tensor", ROWS)]),
        ({ROWS: None, TASK_ROWS: ones(3, 2, 32)}, [("missing_tensor", ROWS), ("shape_mismatch", TASK_ROWS)]),
        ({COLS: ones(4, 6)}, [("shape_mismatch", COLS)]),
        ({COLS: ones(0, 3, 2), TASK_ROWS: ones(0, 2, 32)}, [("shape_mismatch", COLS), ("shape_mismatch", TASK_ROWS)]),
        ({COLS: ones(4, 3, 0), TASK_ROWS: ones(4, 0, 32)}, [("shape_mismatch", COLS), ("shape_mismatch", TASK_ROWS)]),
        ({COLS: ones(4, 5, 2)}, [("shape_mismatch", COLS)]),
        ({TASK_ROWS: ones(3, 2, 32)}, [("shape_mismatch", TASK_ROWS)]),
        ({TASK_ROWS: ones(4, 1, 32)}, [("shape_mismatch", TASK_ROWS)]),
        ({TASK_ROWS: ones(4, 2, 16)}, [("shape_mismatch", TASK_ROWS)]),
        ({ROWS: ones(3, 16), TASK_ROWS: ones(4, 2, 16)}, [("shape_mismatch", ROWS)]),
        ({COLS: ones(4, 3, 2, dtype=np.int8)}, [("unsupported_dtype", COLS)]),
        ({TASK_ROWS: ones(4, 2, 32) * np.nan}, [("non_finite_values", TASK_ROWS)]),
        ({"prefix_task_bias": ones(1)}, [("unexpected_tensor", "prefix_task_bias")]),
        ({WEIGHT: ones(2, 32)}, [("unexpected_tensor", WEIGHT)]),
    ],
)
def test_factors_must_fit_the_rows_and_each_other(changes: dict[str, Any], want: list[tuple[str, str]]) -> None:
    assert faults(MULTITASK, multitask(**changes)) == want


def test_the_message_on_a_factor_shows_the_shapes() -> None:
    (fault,) = refused(MULTITASK, multitask(**{TASK_ROWS: ones(4, 1, 32)}))
    assert "prefix_task_rows has shape [4, 1, 32]; [num_tasks, num_ranks, width] is [4, 2, 32]" in fault.message
    assert "prompt_embeddings has [3, 32], prefix_task_cols has [4, 3, 2]" in fault.message


@pytest.mark.parametrize(
    ("stated", "want"),
    [
        ({"num_tasks": 3}, [("num_tasks_mismatch", COLS)]),
        ({"num_ranks": 10**400}, [("num_ranks_mismatch", COLS)]),
        ({"num_tasks": 5, "num_ranks": 3}, [("num_tasks_mismatch", COLS), ("num_ranks_mismatch", COLS)]),
        ({"num_tasks": None}, []),
    ],
)
def test_the_configuration_must_agree_with_the_factors(stated: dict[str, Any], want: list[Any]) -> None:
    assert faults(MULTITASK | stated, multitask()) == want


def test_factors_belong_to_multitask_prompts_alone() -> None:
    config = MULTITASK | {"peft_type": "PROMPT_TUNING"}
    assert faults(config, multitask()) == [("unexpected_tensor", COLS), ("unexpected_tensor", TASK_ROWS)]


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 70000.0), ("bfloat16", 3.4e38), ("float32", 1e38)])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_products_must_be_finite(monkeypatch: pytest.MonkeyPatch, dtype: str, factor: float, chunk: int) -> None:
    monkeypatch.setattr(numerics, "_CHUNK_ELEMENTS", chunk)
    base = dataclasses.replace(BASE, dtype=dtype)
    tensors = multitask()
    tensors[TASK_ROWS][2, 1, 9] = factor
    tensors[ROWS][1] = 8.0
    (fault,) = refused(MULTITASK, tensors, base)
    assert (fault.code, fault.field) == ("dtype_overflow", ROWS)
    first_row = 0 if dtype != "float32" else 1
    assert f"task 2 at row {first_row}, column 9" in fault.message
    tensors[COLS][2] = 0.0
    assert isinstance(check(MULTITASK, tensors, base), SoftPrompt)


def test_factors_may_exceed_the_serving_dtype_if_the_products_do_not() -> None:
    tensors = multitask(**{TASK_ROWS: ones(4, 2, 32) * 1e-6, COLS: ones(4, 3, 2) * 1e5})
    assert isinstance(check(MULTITASK, tensors, dataclasses.replace(BASE, dtype="float16")), SoftPrompt)


@pytest.mark.parametrize("module", ["score", "classifier"])
def test_a_head_is_accepted(module: str) -> None:
    assert check(HEAD, with_head(labels=5, module=module)).num_labels == 5
    bias = {f"base_model.{module}.bias": ones(5)}
    assert check(HEAD, with_head(labels=5, module=module) | bias).num_labels == 5
    assert check(HEAD, with_head(labels=1, module=module)).num_tasks is None


@pytest.mark.parametrize("peft_type", ["P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "MULTITASK_PROMPT_TUNING"])
def test_other_methods_may_have_a_head(peft_type: str) -> None:
    tensors = multitask() if peft_type == "MULTITASK_PROMPT_TUNING" else {}
    rows = ones(3, 64 if peft_type in ("PREFIX_TUNING", "CARTRIDGE") else 32)
    prompt = check(HEAD | {"peft_type": peft_type}, tensors | {ROWS: rows, WEIGHT: ones(2, 32)})
    assert prompt.num_labels == 2


def test_a_head_reads_hidden_states_not_embeddings() -> None:
    base = dataclasses.replace(BASE, hidden_size=48)
    assert faults(HEAD, with_head(), base) == [("shape_mismatch", WEIGHT)]
    assert check(HEAD, with_head() | {WEIGHT: ones(2, 48)}, base).num_labels == 2


@pytest.mark.parametrize(
    ("tensors", "want"),
    [
        ({ROWS: ones(3, 32)}, [("missing_tensor", WEIGHT)]),
        ({ROWS: ones(3, 32), BIAS: ones(2)}, [("missing_tensor", WEIGHT)]),
        (with_head() | {BIAS: ones(3)}, [("shape_mismatch", BIAS)]),
        (with_head() | {BIAS: ones(2, 1)}, [("shape_mismatch", BIAS)]),
        (with_head() | {WEIGHT: ones(32)}, [("shape_mismatch", WEIGHT)]),
        (with_head(labels=0), [("shape_mismatch", WEIGHT)]),
        (with_head() | {WEIGHT: ones(2, 31)}, [("shape_mismatch", WEIGHT)]),
        (with_head() | {"base_model.classifier.weight": ones(2, 32)}, [("several_heads", "base_model.classifier")]),
        (with_head() | {"base_model.classifier.bias": ones(2)}, [("several_heads", "base_model.classifier")]),
        (with_head() | {BIAS: ones(2) * np.inf}, [("non_finite_values", BIAS)]),
        (with_head() | {WEIGHT: ones(2, 32, dtype=np.int32)}, [("unsupported_dtype", WEIGHT)]),
        (
            with_head() | {"base_model.score.dense.weight": ones(2)},
            [("unexpected_tensor", "base_model.score.dense.weight")],
        ),
        (with_head() | {"base_model.lm_head.weight": ones(2)}, [("unexpected_tensor", "base_model.lm_head.weight")]),
        (with_head() | {"score.weight": ones(2, 32)}, [("unexpected_tensor", "score.weight")]),
        (with_head() | {f"{WEIGHT}\n": ones(2, 32)}, [("unexpected_tensor", f"{WEIGHT}\n")]),
    ],
)
def test_heads_of_a_wrong_shape_or_name_are_rejected(tensors: dict[str, Any], want: list[tuple[str, str]]) -> None:
    assert faults(HEAD, tensors) == want


def test_a_head_beyond_the_serving_dtype() -> None:
    tensors = with_head() | {WEIGHT: ones(2, 32) * 70000}
    assert faults(HEAD, tensors, dataclasses.replace(BASE, dtype="float16")) == [("dtype_overflow", WEIGHT)]
    assert faults(HEAD, tensors) == []


def test_a_head_in_a_generation_prompt_is_rejected() -> None:
    assert faults(HEAD | {"task_type": "CAUSAL_LM"}, with_head()) == [("unexpected_tensor", WEIGHT)]


@pytest.mark.parametrize("broken", [None, {}, "NO_SUCH"])
def test_tensors_are_not_unexpected_if_the_method_is_unknown(
    broken: dict[str, Any] | str | None,
) -> None:
    found = faults(MULTITASK | {"peft_type": broken, "task_type": broken}, multitask() | {WEIGHT: ones(2, 32)})
    assert {field for _, field in found} == {"peft_type", "task_type"}


def test_float64_is_rejected_unless_it_is_allowed() -> None:
    tensors = multitask(**{name: tensor.astype(np.float64) for name, tensor in multitask().items()})
    assert faults(MULTITASK, tensors) == [("unsupported_dtype", name) for name in (ROWS, COLS, TASK_ROWS)]
    assert check(MULTITASK, tensors, allow_float64=True).num_tasks == 4
    head = {name: tensor.astype(np.float64) for name, tensor in with_head().items()}
    assert faults(HEAD, head) == [("unsupported_dtype", ROWS), ("unsupported_dtype", WEIGHT)]
    assert check(HEAD, head, allow_float64=True).num_labels == 2


@pytest.mark.parametrize(
    ("value", "dtype", "want"),
    [
        (np.nan, "float32", ["non_finite_values"]),
        (-np.inf, "float32", ["non_finite_values"]),
        (3.4028235e38, "float32", []),
        (-3.5e38, "float32", ["dtype_overflow"]),
        (1e300, "bfloat16", ["dtype_overflow"]),
        (65519.0, "float16", []),
        (65520.0, "float16", ["dtype_overflow"]),
        (65520.0, "bfloat16", []),
        (1e-320, "float16", []),
    ],
)
def test_float64_must_be_finite_before_and_after_the_cast(value: float, dtype: str, want: list[Any]) -> None:
    rows = ones(3, 32, dtype=np.float64)
    rows[1, 2] = value
    config, base = HEAD | {"task_type": "CAUSAL_LM"}, dataclasses.replace(BASE, dtype=dtype)
    assert [code for code, _ in faults(config, {ROWS: rows}, base, allow_float64=True)] == want


def test_other_dtypes_are_always_rejected() -> None:
    config = HEAD | {"task_type": "CAUSAL_LM"}
    assert faults(config, {ROWS: ones(3, 32, dtype=np.int64)}, allow_float64=True) == [("unsupported_dtype", ROWS)]


def test_what_peft_saves_by_every_method_can_be_published(
    store: PromptStore, publish: Publish, peft_files: dict[str, tuple[bytes, bytes]]
) -> None:
    for name, files in peft_files.items():
        version, created = publish(store, files, name=name)
        stored = json.loads(files[0])
        assert created
        assert (version.peft_type, version.task_type) == (stored["peft_type"], stored["task_type"])
