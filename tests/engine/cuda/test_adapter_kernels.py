"""The kernels of adapters compute what torch's operations do, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.engine.adapters.backend import AdaptedRows, PlainAdapters
from server.engine.adapters.products import Part, Product
from server.engine.adapters.weights import AdapterWeights, PartChange
from server.engine.cuda import adapter_backend
from server.engine.cuda.adapter_backend import PlacedAdapter, TritonAdapters, make_adapters
from server.engine.layers.forms import TOLERANCE
from tests.support.engine.lazy_stream import LazyStream
from tests.support.engine.made_up_adapters import CPU, made_up_changes, made_up_products, outputs_of
from tests.support.engine.triton import DEVICE


def both_ways(
    products: list[Product], dtype: torch.dtype, seeds: Sequence[int]
) -> tuple[TritonAdapters, PlainAdapters, list[AdapterWeights], list[AdapterWeights]]:
    """Backends of kernels and of torch's operations, and adapters for each."""
    kernels, plain = TritonAdapters(products, DEVICE, dtype), PlainAdapters(products, DEVICE)
    made = [made_up_changes(products, seed, dtype) for seed in seeds]
    return (
        kernels,
        plain,
        [kernels.place(kernels.pack(changes)) for changes in made],
        [plain.place(plain.pack(changes)) for changes in made],
    )


def check(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    for result, expected in zip(got, want, strict=True):
        assert result.shape == expected.shape
        allowed = 2 * TOLERANCE[dtype] * expected.float().abs().max()
        assert (result.float() - expected.float()).abs().max() <= allowed


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_kernels_equal_torch(dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind, with ranks that differ by module, in tiles of both sizes; the input's columns are divided."""
    monkeypatch.setattr(adapter_backend, "BLOCK_K", 16)
    monkeypatch.setattr(adapter_backend, "BLOCK_RANK", 16)
    monkeypatch.setattr(adapter_backend, "BLOCK_COLUMNS", {16: 32, 64: 16})
    products, rng = made_up_products(dtype, DEVICE), random.Random(seed)
    kernels, plain, own, others = both_ways(products, dtype, range(10 * seed, 10 * seed + 3))
    numbers = [rng.choice([None, 0, 1, 2]) for _ in range(7)]
    most = (1, 9, 40)[seed]
    counts = [rng.randint(1, most) for _ in numbers]
    got = outputs_of(kernels, [None if number is None else own[number] for number in numbers], counts)
    want = outputs_of(plain, [None if number is None else others[number] for number in numbers], counts)
    check(got, want, dtype)
    assert all("forward" not in vars(product.module) for product in products)


@torch.inference_mode()
def test_rows_without_an_adapter_are_those_of_the_product() -> None:
    products = made_up_products(torch.float32, DEVICE)
    backend, _, (weights,), _ = both_ways(products, torch.float32, [1])
    bare = outputs_of(backend, [None, None, None], [2, 5, 2])
    mixed = outputs_of(backend, [None, weights, None], [2, 5, 2])
    for index in (0, 1, 3):
        assert torch.equal(mixed[index][:, :2], bare[index][:, :2])
        assert torch.equal(mixed[index][:, 7:], bare[index][:, 7:])
        assert not torch.equal(mixed[index], bare[index]) or index not in weights.products


def one_product(in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> list[Product]:
    module = nn.Linear(in_features, out_features, dtype=dtype, device=DEVICE)
    part, holder = Part("m", 0, out_features), vars(module)
    shape = "linear", in_features, out_features
    return [Product(0, (part,), *shape, False, 1.0, module, module.forward, holder, "forward", is_own=False)]


@torch.inference_mode()
def test_a_poisoned_row_changes_no_other_row() -> None:
    products = one_product(40, 24)
    backend = TritonAdapters(products, DEVICE, torch.float32)
    weights = backend.place(backend.pack({0: [PartChange(0, 24, torch.randn(3, 40), torch.randn(24, 3))]}))
    rows = torch.randn(3, 40, device=DEVICE)
    outputs = []
    for poison in (0.0, float("nan")):
        rows[1] = poison
        with backend.adapting(AdaptedRows([weights], [3]), AdaptedRows([], [])):
            outputs.append(products[0].module(rows))
    assert outputs[1][1].isnan().all()
    assert torch.equal(outputs[0][::2], outputs[1][::2])


@torch.inference_mode()
def test_decodes_read_their_adapters_from_tables_at_fixed_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launches compute other adapters once the tables were filled again."""
    products = made_up_products(torch.float32, DEVICE)
    backend, plain, own, others = both_ways(products, torch.float32, [3, 4, 5])
    decodes = backend.decodes(8)
    taken = [number for number, weights in enumerate(own) if decodes.takes([None, weights])]
    assert [number for number, one in enumerate(own) if isinstance(one, PlacedAdapter) and one.input_gains] == [
        number for number in range(len(own)) if number not in taken
    ]
    assert taken
    ids = torch.randint(0, 31, (1, 6), device=DEVICE)
    rows = [torch.randn(1, 6, product.in_features, device=DEVICE) for product in products[:-1]] + [ids]
    for numbers in ([0, 1, 2, None, 1, 0], [None] * 6, [2, 2, 2, 2, 2, 2], [None, None, 0], [0, None, None, 0, 1]):
        chosen = [None if number is None or number not in taken else number for number in numbers]
        decodes.fill([None if number is None else own[number] for number in chosen])
        with decodes.adapting(6):
            got = [product.module(given) for product, given in zip(products, rows, strict=True)]
        padded = [*(None if number is None else others[number] for number in chosen), *[None] * (6 - len(chosen))]
        of_rows = AdaptedRows(padded, [1] * 6)
        with plain.adapting(of_rows, of_rows):
            want = [product.module(given) for product, given in zip(products, rows, strict=True)]
        check(got, want, torch.float32)
    assert all("forward" not in vars(product.module) for product in products)


def test_tables_that_did_not_change_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, (first, second), _ = both_ways(made_up_products(torch.float32, DEVICE), torch.float32, [3, 4])
    decodes, copies, divide = backend.decodes(4), [], adapter_backend.tiles_of

    def counted(*arguments: Any) -> Any:
        copies.append(1)
        return divide(*arguments)

    monkeypatch.setattr(adapter_backend, "tiles_of", counted)
    for adapters, count in (
        ([None, None], 0),
        ([first], 1),
        ([first, None, None], 1),
        ([second], 2),
        ([second, first], 3),
        ([], 4),
    ):
        decodes.fill(adapters)
        assert len(copies) == count


def test_an_adapter_of_a_rank_that_the_tables_have_no_room_for_is_not_replayed() -> None:
    backend = TritonAdapters(one_product(300, 24), DEVICE, torch.float32)
    decodes = backend.decodes(4)
    for rank, is_taken in ((256, True), (257, False)):
        change = PartChange(0, 24, torch.zeros(rank, 300), torch.zeros(24, rank))
        assert decodes.takes([backend.place(backend.pack({0: [change]}))]) is is_taken


def test_ranks_are_not_padded() -> None:
    backend = TritonAdapters(one_product(64, 32), DEVICE, torch.bfloat16)
    change = PartChange(0, 32, torch.ones(3, 64), torch.ones(32, 3))
    needed = 2 * 3 * (64 + 32)
    assert needed <= backend.pack({0: [change]}).nbytes <= needed + 3 * adapter_backend.ALIGNMENT


def test_an_adapter_is_copied_in_pieces_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_backend, "PIECE_BYTES", 1024)
    products, stream = one_product(64, 32), LazyStream()
    direct = TritonAdapters(products, CPU, torch.float32)
    staged = TritonAdapters(products, CPU, torch.float32, stream=stream)
    change = PartChange(0, 32, torch.randn(20, 64), torch.randn(32, 20))
    packed = direct.pack({0: [change]})
    assert packed.nbytes > 3 * 1024
    placed, other = staged.place(packed), direct.place(packed)
    assert isinstance(placed, PlacedAdapter)
    assert isinstance(other, PlacedAdapter)
    first = adapter_backend.ALIGNMENT
    assert torch.equal(placed._memory[first:], other._memory[first:])
    assert torch.equal(placed._memory[first:], packed.memory[first:])


def test_products_in_another_dtype_are_refused() -> None:
    products = one_product(64, 32)
    backend = TritonAdapters(products, DEVICE, torch.bfloat16)
    weights = backend.place(backend.pack({0: [PartChange(0, 32, torch.ones(3, 64), torch.ones(32, 3))]}))
    with (
        backend.adapting(AdaptedRows([weights], [2]), AdaptedRows([], [])),
        pytest.raises(NotImplementedError, match="float32"),
    ):
        products[0].module(torch.ones(2, 64, device=DEVICE))


def test_weights_of_another_backend_are_refused() -> None:
    products = one_product(64, 32)
    kernels, plain = TritonAdapters(products, DEVICE, torch.float32), PlainAdapters(products, DEVICE)
    for backend, other in ((kernels, plain), (plain, kernels)):
        with pytest.raises(TypeError, match="not packed by this backend"):
            backend.place(other.pack({}))


def test_without_triton_torch_s_operations_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("no Triton")

    products = one_product(8, 8)
    assert isinstance(make_adapters(products, CPU, torch.float32, num_processors=4, stream=None), TritonAdapters)
    monkeypatch.setattr(adapter_backend, "load_kernels", fail)
    assert isinstance(make_adapters(products, CPU, torch.float32, num_processors=4, stream=None), PlainAdapters)
    assert "adapters run by torch's operations" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [("80", "bfloat16"), ("90", "bfloat16"), ("90", "float32")])
def test_kernels_compile_for_gpus_without_spills(capability: str, dtype: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.engine.compile_adapter_kernels"]
    command += ["--capabilities", capability, "--dtypes", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["kernel"], one["TILE"]) for one in built} == {
        (kernel, tile) for kernel in ("shrink", "expand") for tile in (16, 64)
    }
    assert all(one["spilled"] == 0 and one["shared"] <= 99 * 1024 for one in built), built
    assert all(one["copies"] >= 4 for one in built if one["kernel"] == "shrink"), "columns are not fetched ahead"
