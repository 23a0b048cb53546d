from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from prompt_store.files import numerics
from prompt_store.files.numerics import count_non_finite, count_overflows
from prompt_store.types import TensorData

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_of(values: torch.Tensor) -> TensorData:
    name = next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
    return TensorData(name, tuple(values.shape), values.flatten().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_counted_with_the_first_index(dtype: torch.dtype, value: float) -> None:
    rows = torch.ones(4, 8, dtype=dtype)
    assert count_non_finite(tensor_of(rows)) == (0, -1)
    rows[1, 3] = rows[2, 0] = value
    assert count_non_finite(tensor_of(rows)) == (2, 11)


def test_every_chunk_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_CHUNK_ELEMENTS", 5)
    rows = torch.ones(23)
    rows[[7, 22]] = float("nan")
    assert count_non_finite(tensor_of(rows)) == (2, 7)


def test_unaligned_data_are_read() -> None:
    data = memoryview(b"x" + struct.pack("<2f", 1.0, float("inf")))[1:]
    assert count_non_finite(TensorData("F32", (2,), data)) == (1, 1)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize(
    ("serving", "target"),
    [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_overflow_is_what_torch_rounds_to_infinity(source: str, serving: str, target: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    edges = [65504.0, 65519.996, 65520.0, 65536.0, 3.3895e38, 3.3961775e38, 3.3961776e38, 3.4028234e38]
    values = torch.tensor([*bits[np.isfinite(bits)].tolist(), *edges, *(-edge for edge in edges)])
    values = values.to(DTYPES[source])
    values = values[torch.isfinite(values)]
    want = torch.isinf(values.to(target))
    count, first = count_overflows(tensor_of(values), serving)
    assert count == int(want.sum())
    assert first == (int(want.nonzero()[0]) if count else -1)


def test_non_finite_values_are_not_overflows() -> None:
    assert count_overflows(tensor_of(torch.tensor([float("nan"), float("inf")])), "bfloat16") == (0, -1)
    assert count_overflows(tensor_of(torch.tensor([float("nan"), float("-inf")])), "float16") == (0, -1)


def test_other_dtypes_are_a_key_error() -> None:
    with pytest.raises(KeyError):
        count_non_finite(TensorData("I8", (1,), b"1"))
    with pytest.raises(KeyError):
        count_overflows(TensorData("F32", (1,), b"1234"), "float8")
