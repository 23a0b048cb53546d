"""What an adapter changes in each module of the base: norms of the weight's change."""

from __future__ import annotations

import math

import torch

from server.engine.adapters.products import Part, Product
from server.engine.adapters.reading import AdapterReader
from server.engine.adapters.weights import PartChange
from server.engine.messages import AdapterInspection, InspectedModule
from server.engine.types import AdapterSource

NUM_ITERATIONS = 40
"""Of the power method, for changes that have no low rank: the norm is then found to about 1%."""

_ROWS_AT_ONCE = 4096
"""Rows of embeddings whose norm is computed at once."""


@torch.inference_mode()
def inspect_adapter(reader: AdapterReader, source: AdapterSource) -> AdapterInspection:
    """Measure an adapter, from any thread.

    The norms of ``B A`` follow from products of rank by rank. The gains of DoRA and IA3 change every row or column of
    the weight, so their norms need the weight itself.

    Args:
        reader: Reads adapters for the served model.
        source: The adapter.

    Raises:
        Exception: Of any kind, if its files cannot be read.
        AdapterLoadError: If they do not match the base.
    """
    changes = reader.changes(source)
    modules = []
    for product in reader.products:
        by_start = {change.start: change for change in changes.get(product.index, ())}
        for part in product.parts:
            change = by_start.get(part.start)
            if change is not None:
                modules.append(_inspect(reader, product, part, change))
    return AdapterInspection(modules)


def _inspect(reader: AdapterReader, product: Product, part: Part, change: PartChange) -> InspectedModule:
    scale = change.scale / product.scale if change.rank else 1.0
    if change.gain is None and change.input_gain is None:
        frobenius, spectral = _low_rank_norms(change, scale)
    else:
        weight = product.weight(reader.dtype)[part.start : part.start + part.size].float().cpu()
        frobenius, spectral = _dense_norms(weight, change, scale)
    own = _embedding_norm(product) if product.kind == "embedding" else float(reader.weight_norms(part.name).norm())
    return InspectedModule(
        name=part.name,
        rank=change.rank,
        scale=scale,
        frobenius_norm=frobenius,
        spectral_norm=spectral,
        share=frobenius / own if own else 0.0,
    )


def _low_rank_norms(change: PartChange, scale: float) -> tuple[float, float]:
    """Frobenius and spectral norm of ``scale * B A``; zeros without A and B."""
    if change.a is None or change.b is None:
        return 0.0, 0.0
    a, b = change.a.double().cpu(), change.b.double().cpu()
    rows, columns = a @ a.t(), b.t() @ b
    values, vectors = torch.linalg.eigh(rows)
    root = vectors * values.clamp_min(0.0).sqrt()
    squares = torch.linalg.eigvalsh(root.t() @ columns @ root).clamp_min(0.0) * scale * scale
    return float(squares.sum().sqrt()), float(squares.max().sqrt())


def _dense_norms(weight: torch.Tensor, change: PartChange, scale: float) -> tuple[float, float]:
    """The norms of a change with a gain: ``(gain - 1) W + scale * B A``, or ``W (input gain - 1)``.

    Args:
        weight: [size, in_features] float32.
        change: Its B is multiplied by the gain already.
        scale: Factor of ``B A``.
    """
    changed = torch.zeros_like(weight)
    if change.input_gain is not None:
        changed += weight * (change.input_gain - 1.0)
    if change.gain is not None:
        changed += weight * (change.gain - 1.0)[:, None]
    if change.a is not None and change.b is not None:
        changed += scale * (change.b.float() @ change.a.float())
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(changed.shape[1], generator=generator)
    spectral = 0.0
    for _ in range(NUM_ITERATIONS):
        length = float(vector.norm())
        if length == 0.0:
            break
        image = changed @ (vector / length)
        spectral = float(image.norm())
        vector = changed.t() @ image
    return float(changed.double().norm()), spectral


def _embedding_norm(product: Product) -> float:
    """The Frobenius norm of the table of embeddings."""
    table = next(iter(product.module.parameters()))
    square = sum(
        float(table[first : first + _ROWS_AT_ONCE].double().square().sum())
        for first in range(0, len(table), _ROWS_AT_ONCE)
    )
    return math.sqrt(square)
