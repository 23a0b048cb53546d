"""The compiled kernels of adapters compute what torch's operations do."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from server.engine.adapters.backend import PlainAdapters
from server.engine.adapters.products import Part, Product
from server.engine.adapters.weights import PartChange
from server.engine.cpu import adapter_backend
from server.engine.cpu.adapter_backend import CPUAdapters, make_adapters
from server.engine.cpu.bf16_dot import has_bf16_dot
from tests.support.engine.made_up_adapters import RANKS, made_up_changes, made_up_products, outputs_of

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["one thread", "threads"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "threads":
        monkeypatch.setattr(adapter_backend, "SERIAL_WORK", -1)
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@torch.inference_mode()
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_kernels_equal_torch(dtype: torch.dtype, seed: int) -> None:
    products = made_up_products(dtype, count=4)
    compiled = make_adapters(products, CPU, dtype)
    if dtype is torch.bfloat16 and not has_bf16_dot():
        pytest.skip("this processor has no products of bfloat16")
    assert isinstance(compiled, CPUAdapters)
    rng, plain = random.Random(seed), PlainAdapters(products, CPU)
    made = [made_up_changes(products, 10 * seed + number, dtype, (*RANKS, 64)) for number in range(3)]
    own, others = [compiled.pack(changes) for changes in made], [plain.pack(changes) for changes in made]
    numbers = [rng.choice([None, 0, 1, 2]) for _ in range(12)]
    counts = [rng.choice([1, 1, 2, 3, 9, 21]) for _ in numbers]
    got = outputs_of(compiled, [None if number is None else own[number] for number in numbers], counts)
    want = outputs_of(plain, [None if number is None else others[number] for number in numbers], counts)
    bare = [product.module for product in products]
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6
    for result, expected in zip(got, want, strict=True):
        assert result.shape == expected.shape
        difference = (result.float() - expected.float()).abs().max()
        assert difference <= tolerance * expected.float().abs().max()
    assert all("forward" not in vars(module) for module in bare)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_adapter_are_those_of_the_product(dtype: torch.dtype) -> None:
    products = made_up_products(dtype, count=4)
    backend = make_adapters(products, CPU, dtype)
    weights = backend.pack(made_up_changes(products, 1, dtype))
    bare = outputs_of(backend, [None, None, None], [2, 5, 2])
    mixed = outputs_of(backend, [None, weights, None], [2, 5, 2])
    for index in (0, 1, 3, 4):
        torch.testing.assert_close(mixed[index][:, :2], bare[index][:, :2], rtol=0, atol=0)
        torch.testing.assert_close(mixed[index][:, 7:], bare[index][:, 7:], rtol=0, atol=0)


def test_the_size_in_memory_is_that_of_the_matrices() -> None:
    products = made_up_products(torch.float32)
    backend = make_adapters(products, CPU, torch.float32)
    change = PartChange(0, 37, torch.ones(16, 24), torch.ones(37, 16))
    weights = backend.pack({1: [change]})
    needed = (16 * 24 + 48 * 16 + 16) * 4
    assert needed <= weights.nbytes <= needed + 1024


def test_odd_widths_are_computed_by_torch_in_bfloat16() -> None:
    module = nn.Linear(7, 4, dtype=torch.bfloat16)
    part = Part("m", 0, 4)
    product = Product(
        0, (part,), "linear", 7, 4, False, 1.0, module, module.forward, vars(module), "forward", is_own=False
    )
    assert isinstance(make_adapters([product], CPU, torch.bfloat16), PlainAdapters)


def test_kernels_that_cannot_be_compiled_are_replaced_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_self: CPUAdapters) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CPUAdapters, "compile", fail)
    assert isinstance(make_adapters(made_up_products(torch.float32), CPU, torch.float32), PlainAdapters)
    assert "the kernels of adapters cannot be compiled" in caplog.text
