"""Each kernel equals the models' own operations, for one row and for many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from server.engine.cpu import row_kernels
from server.engine.cpu.compiled import elements, exp
from server.engine.cpu.row_kernels import GELU_TANH, NO_WEIGHT, SERIAL_ELEMENTS, SILU

DTYPES = [torch.float32, torch.bfloat16]
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
FEW, MANY = 3, SERIAL_ELEMENTS // 48 + 1


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = PRECISION[got.dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


def rotate(
    projected: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    factors: list[torch.Tensor | None],
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    weights = [NO_WEIGHT if factor is None else factor.float().numpy() for factor in factors]
    own = np.empty(len(projected) - len(value), np.float32)
    row_kernels.rotate_row(
        elements(projected), cos.numpy(), sin.numpy(), *weights, 1e-6, True, own, elements(key), elements(value)
    )


def test_exp_equals_numpy() -> None:
    numbers = np.concatenate(
        [np.linspace(-87, 88, 20_001, dtype=np.float32), np.array([0.0, -200.0, 200.0], np.float32)]
    )
    got = np.array([exp(x) for x in numbers])
    wanted = np.exp(np.clip(numbers, -87, 88).astype(np.float64))
    np.testing.assert_allclose(got, wanted, rtol=4e-7)
    assert math.isnan(exp(np.float32(math.nan)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("rounds_first", [False, True])
def test_norms_equal_the_formula(num_rows: int, dtype: torch.dtype, rounds_first: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(num_rows, 50).to(dtype)
    rows[1] *= 1e-4
    weight = torch.randn(50).to(dtype)
    out = torch.empty_like(rows)
    row_kernels.rms_norm(rows, weight.float().numpy(), 1e-6, rounds_first, out)
    normed = rows.double() * torch.rsqrt(rows.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    close(out, (normed.to(dtype) * weight if rounds_first else normed * weight.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
def test_sums_and_their_norms_equal_torch(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    rows, total = torch.randn(2, num_rows, 50).to(dtype)
    wanted, weight = rows + total, torch.rand(50).numpy()
    alone, normed = total.clone(), torch.empty_like(rows)
    row_kernels.add(rows, alone)
    row_kernels.add_and_norm(rows, total, weight, 1e-6, True, normed)
    assert torch.equal(alone, wanted)
    assert torch.equal(total, wanted)
    other = torch.empty_like(rows)
    row_kernels.rms_norm(wanted, weight, 1e-6, True, other)
    close(normed, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize(
    ("activation", "function"),
    [(SILU, nn.functional.silu), (GELU_TANH, lambda x: nn.functional.gelu(x, approximate="tanh"))],
)
def test_gates_equal_torch(num_rows: int, dtype: torch.dtype, activation: int, function: nn.Module) -> None:
    torch.manual_seed(1)
    both = (torch.randn(num_rows, 100) * 4).to(dtype)
    both[0, :6] = torch.tensor([-1e4, 1e4, -100.0, 100.0, 0.0, math.nan])
    out = torch.empty(num_rows, 50, dtype=dtype)
    row_kernels.gate(both, activation, out)
    close(out, function(both[:, :50]) * both[:, 50:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [10, SERIAL_ELEMENTS // 2500 + 1])
def test_the_largest_elements_equal_torch_with_the_first_of_equals(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    rows = torch.randn(num_rows, 2500).to(dtype)
    rows[1] = 3.0
    rows[2, 2499] = 9.0
    rows[3, [1023, 1024, 2048]] = 9.0
    rows[4, 100:] = -math.inf
    rows[5] = -math.inf
    rows[6, 2048] = math.inf
    rows[7] = -1.0
    rows[7, [1, 1500]] = torch.tensor([-0.0, 0.0], dtype=dtype)
    rows[8, [3, 2047]] = torch.tensor([math.inf, math.nan], dtype=dtype)
    rows[9, 5] = -torch.tensor(math.nan, dtype=dtype)
    values, indices = row_kernels.largest(rows)
    wanted = torch.max(rows, dim=-1)
    assert torch.equal(values[:8], wanted.values[:8].float())
    assert values[8:10].isnan().all()
    assert indices[[1, 2, 3, 5, 6, 7]].tolist() == [0, 2499, 1023, 0, 2048, 1]
    # bfloat16 has equal elements, of which torch may return another.
    assert torch.equal(rows.gather(1, indices[:, None])[:8, 0], wanted.values[:8])
    if dtype is torch.float32:
        assert torch.equal(indices[:8], wanted.indices[:8])


def test_torch_serves_if_a_kernel_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_dtype: torch.dtype) -> None:
        raise RuntimeError("LLVM does not know this processor")

    row_kernels.can_compile.cache_clear()
    assert row_kernels.can_compile(torch.float32)
    assert not row_kernels.can_compile(torch.float16)
    monkeypatch.setattr(row_kernels, "compile_for", fail)
    assert row_kernels.can_compile(torch.float32)
    row_kernels.can_compile.cache_clear()
    assert not row_kernels.can_compile(torch.float32)
    assert "kernels cannot be compiled" in caplog.text
    row_kernels.can_compile.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("width", [10, 64, 80])
def test_positions_are_rotated_as_llama_does_and_stored(width: int, dtype: torch.dtype, has_norms: bool) -> None:
    torch.manual_seed(2)
    num_heads, num_kv_heads = 6, 2
    projected = torch.randn(FEW, (num_heads + 2 * num_kv_heads) * width).to(dtype)
    parts = torch.split(projected.clone().view(FEW, -1, width), [num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = (torch.rand(FEW, width // 2) * 100).repeat(1, 2)
    cos, sin = angles.cos().to(dtype).float(), angles.sin().to(dtype).float()
    keys, values = torch.empty(2, FEW, num_kv_heads * width, dtype=dtype)
    factors = [torch.rand(width).to(dtype) + 0.5 if has_norms else None for _ in range(2)]
    for row in range(FEW):
        rotate(projected[row], cos[row], sin[row], factors, keys[row], values[row])

    heads = [part.transpose(0, 1)[None] for part in parts[:2]]
    for index, factor in enumerate(factors):
        if factor is not None:
            normed = heads[index].float() * torch.rsqrt(heads[index].float().pow(2).mean(-1, keepdim=True) + 1e-6)
            heads[index] = normed.to(dtype) * factor
    wanted_query, wanted_keys = apply_rotary_pos_emb(*(head.float() for head in heads), cos[None], sin[None])
    query = projected[:, : num_heads * width]
    for got, wanted in ((query, wanted_query), (keys, wanted_keys)):
        # Sums of two rotated parts, so the tolerance is that of the parts.
        scale = 4 * PRECISION[dtype]
        wanted_rows = wanted[0].transpose(0, 1).reshape(FEW, -1)
        torch.testing.assert_close(got.float(), wanted_rows, rtol=scale, atol=scale)
    assert torch.equal(values, parts[2].reshape(FEW, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_stored_unchanged(dtype: torch.dtype) -> None:
    projected = torch.tensor([math.nan, 1.0, math.inf, 1.0, -math.inf, math.nan]).to(dtype)
    keys, values = torch.zeros(2, 2, dtype=dtype)
    rotate(projected, torch.ones(2), torch.zeros(2), [None, None], keys, values)
    assert projected[:2].isnan().any()
    assert keys.tolist() == [math.inf, pytest.approx(math.nan, nan_ok=True)]
    assert values.tolist() == [-math.inf, pytest.approx(math.nan, nan_ok=True)]
