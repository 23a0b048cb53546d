"""What oneDNN reaches for the model's shapes: layouts for several numbers of rows, torch's products, and splits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional

from server.engine.cpu import packed_linear
from server.engine.cpu.packed_linear import ROWS_HINT, PackedLinear

SHAPES = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
"""Input and output features of the products of a layer of ``build_model``, as the engine stacks them."""

ROWS = (1, 32, 64, 256, 512, 2048)
HINTS = (1, 16, 64, 256, 2048)
PIECES = (64, 128, 256, 512)
"""Rows per product when a product of more rows is split."""

MIN_LAYERS = 10
"""Number of layers whose distinct weights do not fit into the processor's caches."""

ROWS_PER_ROUND, MAX_PASSES = 512, 16
"""With few rows, each way passes through the layers several times in a round."""

ENGINE = f"packed for {ROWS_HINT}"
"""The engine's way."""

Product = Callable[[torch.Tensor], object]
"""Multiplies rows [rows, in_features] with one weight."""


def products_by_way(layers: int, dtype: torch.dtype) -> dict[str, list[dict[str, Product]]]:
    """For each way, the products of each layer by the name of the shape; each layer has separate weights."""
    hints = sorted({*HINTS, ROWS_HINT})
    names = [f"packed for {hint}" for hint in hints] + ["torch.mm", "F.linear"]
    names += [f"{ENGINE}, pieces of {piece}" for piece in PIECES]
    ways: dict[str, list[dict[str, Product]]] = {name: [{} for _ in range(layers)] for name in names}
    for layer in range(layers):
        for shape, (width, height) in SHAPES.items():
            linear = nn.Linear(width, height, bias=False, dtype=dtype).requires_grad_(requires_grad=False)
            for hint in hints:
                with patch.object(packed_linear, "ROWS_HINT", hint):
                    ways[f"packed for {hint}"][layer][shape] = PackedLinear(linear)
            ways["torch.mm"][layer][shape] = _transposed(linear.weight)
            ways["F.linear"][layer][shape] = _linear(linear.weight)
            for piece in PIECES:
                whole = ways[ENGINE][layer][shape]
                ways[f"{ENGINE}, pieces of {piece}"][layer][shape] = _split(whole, piece)
    return ways


def pass_seconds(layers: Sequence[dict[str, Product]], inputs: dict[int, torch.Tensor]) -> dict[str, float]:
    """Seconds by shape of one pass through all layers, in the order of a step."""
    seconds = dict.fromkeys(SHAPES, 0.0)
    with torch.inference_mode():
        for layer in layers:
            for shape, (width, _) in SHAPES.items():
                started = time.perf_counter()
                layer[shape](inputs[width])
                seconds[shape] += time.perf_counter() - started
    return seconds


def compare(dtype: torch.dtype, layers: int, all_rows: Sequence[int], rounds: int) -> list[dict[str, object]]:
    """Run the ways in turn for each number of rows.

    Args:
        dtype: Of weights and rows.
        layers: Number of layers with separate weights, at least ``MIN_LAYERS``.
        all_rows: Numbers of rows; pieces are tried for more rows than they have.
        rounds: Number of rounds after the warm-up.

    Returns:
        For each number of rows and each shape, and for a whole layer: GFLOPS of each way (from its median pass), the
        best way, and the engine's GFLOPS over the best's.
    """
    ways = products_by_way(max(MIN_LAYERS, layers), dtype)
    num_layers = len(ways[ENGINE])
    flops = {shape: 2 * width * height * num_layers for shape, (width, height) in SHAPES.items()}
    results: list[dict[str, object]] = []
    for rows in all_rows:
        inputs = {width: torch.randn(rows, width, dtype=dtype) for width, _ in SHAPES.values()}
        passes = max(1, min(MAX_PASSES, ROWS_PER_ROUND // rows))
        used = {name: products for name, products in ways.items() if rows > _piece(name)}
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in used}
        for number in range(rounds + 1):
            for name, products in used.items():
                passed = [pass_seconds(products, inputs) for _ in range(passes)]
                if number:  # round 0 is the warm-up
                    seconds[name] += passed
        for shape in (*SHAPES, "layer"):
            parts = list(SHAPES) if shape == "layer" else [shape]
            operations = rows * sum(flops[part] for part in parts)
            gflops = {
                name: operations / statistics.median(sum(one[part] for part in parts) for one in several) / 1e9
                for name, several in seconds.items()
            }
            best = max(gflops, key=gflops.__getitem__)
            share = gflops[ENGINE] / gflops[best]
            shown = ", ".join(f"{name} {value:.1f}" for name, value in gflops.items())
            print(f"{rows:5d} rows  {shape:8s} engine over best {share:.3f} ({best})  GFLOPS: {shown}", flush=True)
            results.append(
                {
                    "rows": rows,
                    "shape": shape,
                    "gflops": {name: round(value, 2) for name, value in gflops.items()},
                    "best": best,
                    "engine_over_best": round(share, 3),
                }
            )
    return results


def _piece(name: str) -> int:
    """Rows per piece of a way; 0 if it does not split."""
    return int(name.rpartition(" ")[2]) if "pieces" in name else 0


def _transposed(weight: torch.Tensor) -> Product:
    columns = weight.t()
    return lambda rows: torch.mm(rows, columns)


def _linear(weight: torch.Tensor) -> Product:
    return lambda rows: functional.linear(rows, weight)


def _split(product: Product, piece: int) -> Product:
    return lambda rows: [product(part) for part in torch.split(rows, piece)]
