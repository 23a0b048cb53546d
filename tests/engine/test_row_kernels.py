"""Each kernel gives what the models' own operations give, one row at a time or many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from server.engine import row_kernels
from server.engine.compiled import elements, exp
from server.engine.row_kernels import GELU_TANH, NO_WEIGHT, SERIAL_ELEMENTS, SILU

DTYPES = [torch.float32, torch.bfloat16]
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
FEW, MANY = 3, SERIAL_ELEMENTS // 48 + 1


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = PRECISION[got.dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_exp_is_that_of_numpy() -> None:
    numbers = np.concatenate([np.linspace(-87, 88, 20_001, dtype=np.float32), np.float32([0.0, -200.0, 200.0])])
    got = np.array([exp(x) for x in numbers])
    wanted = np.exp(np.clip(numbers, -87, 88).astype(np.float64))
    np.testing.assert_allclose(got, wanted, rtol=4e-7)
    assert math.isnan(exp(np.float32(math.nan)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("rounds_first", [False, True])
def test_norms_are_those_of_the_formula(num_rows: int, dtype: torch.dtype, rounds_first: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(num_rows, 50).to(dtype)
    rows[1] *= 1e-4
    weight = torch.randn(50).to(dtype)
    out = torch.empty_like(rows)
    row_kernels.rms_norm(elements(rows), weight.float().numpy(), 1e-6, rounds_first, elements(out))
    normed = rows.double() * torch.rsqrt(rows.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    close(out, (normed.to(dtype) * weight if rounds_first else normed * weight.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
def test_sums_and_their_norms_are_those_of_torch(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    rows, total = torch.randn(2, num_rows, 50).to(dtype)
    wanted, weight = rows + total, torch.rand(50).numpy()
    alone, normed = total.clone(), torch.empty_like(rows)
    row_kernels.add(elements(rows), elements(alone))
    row_kernels.add_and_norm(elements(rows), elements(total), weight, 1e-6, True, elements(normed))
    assert torch.equal(alone, wanted)
    assert torch.equal(total, wanted)
    other = torch.empty_like(rows)
    row_kernels.rms_norm(elements(wanted), weight, 1e-6, True, elements(other))
    close(normed, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize(
    ("activation", "function"),
    [(SILU, nn.functional.silu), (GELU_TANH, lambda x: nn.functional.gelu(x, approximate="tanh"))],
)
def test_gates_are_those_of_torch(num_rows: int, dtype: torch.dtype, activation: int, function: nn.Module) -> None:
    torch.manual_seed(1)
    both = (torch.randn(num_rows, 100) * 4).to(dtype)
    both[0, :6] = torch.tensor([-1e4, 1e4, -100.0, 100.0, 0.0, math.nan])
    out = torch.empty(num_rows, 50, dtype=dtype)
    row_kernels.gate(elements(both), activation, elements(out))
    close(out, function(both[:, :50]) * both[:, 50:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [FEW, MANY])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("width", [10, 64, 80])
def test_positions_are_rotated_as_llama_does_and_stored(
    width: int, num_rows: int, dtype: torch.dtype, has_norms: bool
) -> None:
    torch.manual_seed(2)
    num_heads, num_kv_heads = 6, 2
    projected = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * width).to(dtype)
    angles = (torch.rand(num_rows, width // 2) * 100).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(num_rows + 7)[:num_rows]
    keys, values = torch.full((2, num_rows + 7, num_kv_heads, width), 5.0, dtype=dtype)
    query = torch.empty(num_rows, num_heads, width, dtype=dtype)
    factors = [torch.rand(width).to(dtype) + 0.5 if has_norms else None for _ in range(2)]
    weights = [NO_WEIGHT if factor is None else factor.float().numpy() for factor in factors]
    arrays = [elements(tensor) for tensor in (query, keys, values)]
    row_kernels.rotate_and_store(
        elements(projected), elements(cos), elements(sin), slots.numpy(), *weights, 1e-6, True, *arrays
    )

    parts = projected.view(num_rows, -1, width).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    heads = [part.transpose(0, 1)[None] for part in parts[:2]]
    for index, factor in enumerate(factors):
        if factor is not None:
            normed = heads[index].float() * torch.rsqrt(heads[index].float().pow(2).mean(-1, keepdim=True) + 1e-6)
            heads[index] = normed.to(dtype) * factor
    wanted_query, wanted_keys = apply_rotary_pos_emb(*(head.float() for head in heads), cos[None], sin[None])
    for got, wanted in ((query, wanted_query), (keys[slots], wanted_keys)):
        # Sums of two rotated parts, so rounding is that of the parts.
        scale = 4 * PRECISION[dtype]
        torch.testing.assert_close(got.float(), wanted[0].transpose(0, 1), rtol=scale, atol=scale)
    assert torch.equal(values[slots], parts[2])
    untouched = torch.ones(num_rows + 7, dtype=torch.bool)
    untouched[slots] = False
    assert (keys[untouched] == 5).all()
    assert (values[untouched] == 5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_out_of_the_cache_and_in_the_query(dtype: torch.dtype) -> None:
    projected = torch.ones(1, 3 * 2, dtype=dtype)
    projected[0] = torch.tensor([math.nan, 1.0, math.inf, 1.0, -math.inf, math.nan])
    keys, values = torch.zeros(2, 1, 1, 2, dtype=dtype)
    query = torch.empty(1, 1, 2, dtype=dtype)
    cos, sin = torch.ones(1, 2, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    row_kernels.rotate_and_store(
        *(elements(tensor) for tensor in (projected, cos, sin)), np.zeros(1, np.int64), NO_WEIGHT, NO_WEIGHT,
        1e-6, True, *(elements(tensor) for tensor in (query, keys, values)),
    )  # fmt: skip
    assert query.isnan().any()
    assert keys.isfinite().all()
    assert keys[0, 0, 0] == torch.finfo(dtype).max
    assert values[0, 0].tolist() == [torch.finfo(dtype).min, 0.0]
