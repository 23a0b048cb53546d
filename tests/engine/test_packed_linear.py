"""Packed products give what torch's own give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from server.engine.packed_linear import PackedLinear, can_pack, pack_linears

needs_onednn = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this build of torch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_products_are_those_of_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(96, 80, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, rows, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        got = PackedLinear(linear)(x)
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert got.shape == (1, rows, 80)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)


@needs_onednn
def test_only_plain_linears_are_replaced_and_tied_weights_stay() -> None:
    class Quantised(nn.Linear):
        pass

    shared = nn.Linear(8, 8, dtype=torch.bfloat16)
    embedding = nn.Embedding(16, 8, dtype=torch.bfloat16)
    head = nn.Linear(8, 16, bias=False, dtype=torch.bfloat16)
    head.weight = embedding.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "q": Quantised(8, 8), "e": embedding, "h": head})
    model.requires_grad_(False)
    assert pack_linears(model) == 2
    assert model["a"] is model["b"]
    assert isinstance(model["h"], PackedLinear)
    assert type(model["q"]) is Quantised
    assert model["e"].weight.shape == (16, 8)


def test_what_gains_nothing_is_left_alone() -> None:
    assert not can_pack(torch.device("cpu"), torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)
