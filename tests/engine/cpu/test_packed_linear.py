"""Packed linear layers equal torch's."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from server.engine.cpu import packed_linear
from server.engine.cpu.packed_linear import PackedLinear, can_pack, pack_linears
from server.engine.layers.replacement import replace_modules, stacked

PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not can_pack(dtype), reason=f"oneDNN cannot pack {dtype} here"))
    for dtype in PRECISION
]


@pytest.mark.parametrize("name", ["_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"])
def test_torch_has_the_private_operations(name: str) -> None:
    """There is no public way to multiply by a weight in oneDNN's layout."""
    assert hasattr(torch.ops.mkldnn, name), (
        f"torch {torch.__version__} has no torch.ops.mkldnn.{name}; without it CPUs serve several times slower, by "
        "nn.Linear. Use its successor in torch/_inductor/fx_passes/mkldnn_fusion.py in packed_linear, or lower the "
        "upper bound of torch in pyproject.toml"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_products_equal_linear(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(96, 80, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, rows, 96, dtype=dtype)
    with torch.inference_mode():
        got = PackedLinear(linear)(x)
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert got.shape == (1, rows, 80)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), exact, rtol=PRECISION[dtype], atol=PRECISION[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 100, 144])
def test_a_row_that_is_not_finite_spoils_no_other(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    packed = PackedLinear(nn.Linear(width, 64, dtype=dtype).requires_grad_(False))
    rows = torch.randn(1, 33, width, dtype=dtype)
    with torch.inference_mode():
        want = packed(rows)
        for spoiled in range(33):
            others = torch.arange(33) != spoiled
            beside = rows.clone()
            beside[0, spoiled] = torch.nan
            got = packed(beside)
            assert got[0, spoiled].isnan().all()
            assert got[0, others].equal(want[0, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_unpacked_weights_are_bit_equal(biases: tuple[bool, bool], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    linears = [nn.Linear(37, size, bias=bias, dtype=dtype) for size, bias in zip((53, 11), biases, strict=True)]
    unpacked = PackedLinear(stacked(linears)).unpacked([53, 11])
    for linear, again in zip(linears, unpacked, strict=True):
        assert type(again) is nn.Linear
        assert not again.weight.requires_grad
        assert torch.equal(again.weight, linear.weight)
        assert (again.bias is None) == (not any(biases))
        if again.bias is not None:
            own: torch.Tensor | None = linear.bias
            expected = torch.zeros_like(again.bias) if own is None else own
            assert torch.equal(again.bias, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_plain_linears_are_replaced_and_tied_weights_stay(dtype: torch.dtype) -> None:
    class Quantised(nn.Linear):
        pass

    class Codes(torch.Tensor):
        """What torchao makes of a weight."""

    other = nn.Linear(8, 8)
    other.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(Codes))
    shared = nn.Linear(8, 8, dtype=dtype)
    embedding = nn.Embedding(16, 8, dtype=dtype)
    head = nn.Linear(8, 16, bias=False, dtype=dtype)
    head.weight = embedding.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "q": Quantised(8, 8), "o": other, "e": embedding, "h": head})
    model.requires_grad_(False)
    assert pack_linears(model) == 2
    assert model["a"] is model["b"]
    assert isinstance(model["h"], PackedLinear)
    assert type(model["q"]) is Quantised
    assert model["o"] is other
    assert model["e"].weight.shape == (16, 8)


def test_modules_are_released_when_they_are_replaced_and_not_descended_into() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    first, second = Block(), Block()
    model = nn.ModuleDict({"a": first, "b": second, "again": first})
    gone = [weakref.ref(first), weakref.ref(second)]
    del first, second
    alive: list[int] = []

    def make(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Block):
            assert module is model
            return None
        alive.append(sum(reference() is not None for reference in gone))
        return nn.Sequential(nn.Linear(2, 2))

    assert replace_modules(model, make) == 2
    assert alive == [2, 1]
    assert [reference() for reference in gone] == [None, None]
    assert model["a"] is model["again"]
    assert isinstance(next(model["a"].children()), nn.Linear)


def test_what_gains_nothing_is_left_alone() -> None:
    assert not can_pack(torch.float16)


def test_a_processor_without_the_instructions_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw")

    can_pack.cache_clear()
    monkeypatch.setattr(packed_linear, "_reorder", refuse)
    assert not can_pack(torch.bfloat16)
    can_pack.cache_clear()
