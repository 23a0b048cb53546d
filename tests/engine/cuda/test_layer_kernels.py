"""The kernels between products equal torch's formulas for any shape, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from server.engine.attention.backend import AttentionCall, SDPABackend, make_metadata
from server.engine.attention.kv_cache import KVCache, KVCacheSpec
from server.engine.cuda import fused_layers
from server.engine.cuda.fused_layers import FusedAttention, FusedMLP, FusedRMSNorm
from server.engine.layers.forms import ACTIVATIONS, TOLERANCE, NormForm
from server.engine.layers.layer_probe import AttentionForm, GatedForm
from tests.support.engine.triton import DEVICE

pytestmark = pytest.mark.slow


# Without the shrinking phase, which takes minutes in the interpreter. NumPy warns of what is not finite.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    num_rows=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 3),
    half=st.integers(1, 20),
    has_norms=st.booleans(),
    rounds_first=st.booleans(),
    poisoned=st.none() | st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_kernels_equal_formulas_for_any_shape(
    dtype: torch.dtype,
    num_rows: int,
    num_kv_heads: int,
    group_size: int,
    half: int,
    has_norms: bool,
    rounds_first: bool,
    poisoned: int | None,
    seed: int,
) -> None:
    """A row that is not finite changes no other row."""
    torch.manual_seed(seed)
    kernels = fused_layers.load_kernels()
    num_heads, head_dim = group_size * num_kv_heads, 2 * half
    width = num_heads * head_dim
    rows, total = torch.randn(2, num_rows, width).to(DEVICE, dtype)
    projected = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim).to(DEVICE, dtype)
    gates_and_ups = torch.randn(num_rows, 2 * width).mul(4.0).to(DEVICE, dtype)
    if poisoned is not None and poisoned < num_rows:
        for tensor, poison in ((rows, math.inf), (projected, math.nan), (gates_and_ups, math.nan)):
            tensor[poisoned, 0] = poison
    form, query_norm, key_norm = (
        NormForm(torch.randn(size).to(DEVICE), 1e-6, rounds_first) for size in (width, head_dim, head_dim)
    )
    allowed: dict[str, Any] = {"rtol": 2 * TOLERANCE[dtype], "atol": 2 * TOLERANCE[dtype], "equal_nan": True}

    fused = FusedRMSNorm(form, nn.Identity(), kernels)
    torch.testing.assert_close(fused(rows), form(rows), **allowed)
    summed = rows + total
    torch.testing.assert_close(fused.after_sum(rows, total), form(summed), **allowed)
    torch.testing.assert_close(total, summed, **allowed)

    for activation, function in ACTIVATIONS.items():
        mlp: Any = nn.Module()
        mlp.gate_up_proj = nn.Linear(1, 2 * width, bias=False, dtype=dtype)
        mlp.down_proj = nn.Linear(width, 1, bias=False, dtype=dtype)
        gated_mlp = FusedMLP(mlp.to(DEVICE).requires_grad_(False), GatedForm(("gate_up_proj",), activation), kernels)
        vars(gated_mlp)["_gate_up"] = lambda _: gates_and_ups
        gated = gated_mlp._gated(rows)
        gate, up = gates_and_ups.chunk(2, dim=-1)
        torch.testing.assert_close(gated, function(gate) * up, **{**allowed, "atol": 16 * TOLERANCE[dtype]})

    norms = (query_norm, key_norm) if has_norms else None
    attention: Any = nn.Module()
    attention.layer_idx = 0
    attention.qkv_proj = nn.Linear(1, projected.shape[1], bias=False, dtype=dtype)
    attention.o_proj = nn.Linear(width, 1, bias=False, dtype=dtype)
    call = AttentionCall(1.0)
    form_of = AttentionForm(("qkv_proj",), call, num_heads, num_kv_heads, head_dim, norms)
    module = FusedAttention(attention.to(DEVICE).requires_grad_(False), form_of, kernels)
    cache = KVCache(KVCacheSpec(1, num_kv_heads, head_dim, 4, dtype), 2, DEVICE)
    cache.tensor.fill_(7.0)
    backend = SDPABackend(cache)
    module.bind(backend)
    cos, sin = torch.randn(2, 1, num_rows, head_dim).to(DEVICE, dtype)
    query, key, value = torch.split(
        projected.view(num_rows, -1, head_dim).clone(), [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    if has_norms:
        query, key = query_norm(query), key_norm(key)
    expected_query, expected_key = (
        heads * cos[0, :, None] + torch.cat([-heads[..., half:], heads[..., :half]], -1) * sin[0, :, None]
        for heads in (query, key)
    )
    seen = []

    def keep(queries: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(queries.clone())
        return torch.zeros(num_rows, num_heads, head_dim, dtype=dtype, device=DEVICE)

    with pytest.MonkeyPatch.context() as patch:
        vars(module)["_qkv"] = vars(module)["_o"] = lambda _: projected
        patch.setattr(backend, "attend", keep)
        metadata = make_metadata([([1], 0, num_rows)], 4, DEVICE)
        backend.begin(metadata)
        module.attend(rows, (cos, sin))
        backend.end()
    bounds: dict[str, Any] = {**allowed, "atol": 8 * TOLERANCE[dtype]}  # sums of two rounded products
    torch.testing.assert_close(seen[0].transpose(0, 1), expected_query, **bounds)
    keys, values = cache.layer(0)
    torch.testing.assert_close(keys[4 : 4 + num_rows], expected_key, **bounds)
    assert torch.equal(values[4 : 4 + num_rows].nan_to_num(), value.nan_to_num())
    for part in (keys, values):
        assert (part[:4] == 7.0).all()
        assert (part[4 + num_rows :] == 7.0).all()
