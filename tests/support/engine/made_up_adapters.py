"""Made-up products, adapters that change them in every way, and outputs of the products with them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from server.engine.adapters.backend import AdaptedRows, AdapterBackend
from server.engine.adapters.products import Product, parts_of
from server.engine.adapters.weights import AdapterWeights, PartChange

CPU = torch.device("cpu")
PARTS = ((24, 40, 16), (37,), (48,), (48, 80, 21))
WIDTHS = (50, 24, 90, 96)
"""Output features of the parts, and input features, of four products. AMX multiplies rows of 96."""
RANKS = (1, 2, 3, 8, 16, 20, 33)


def made_up_products(dtype: torch.dtype, device: torch.device = CPU, count: int = 3) -> list[Product]:
    """The first ``count`` products, of one or several modules, of which the third is the head, and embeddings."""
    torch.manual_seed(0)
    products = []
    modules: list[nn.Module] = [
        nn.Linear(width, sum(sizes), dtype=dtype) for width, sizes in zip(WIDTHS[:count], PARTS[:count], strict=True)
    ]
    modules.append(nn.Embedding(31, 20, dtype=dtype))
    for index, module in enumerate(modules):
        module.to(device)
        sizes = PARTS[index] if index < count else (20,)
        parts = parts_of([f"m{index}.{number}" for number in range(len(sizes))], sizes)
        products.append(
            Product(
                index=index,
                parts=parts,
                kind="linear" if index < count else "embedding",
                in_features=WIDTHS[index] if index < count else 31,
                out_features=sum(sizes),
                is_head=index == 2,
                scale=1.0,
                module=module,
                original=module.forward,
                holder=vars(module),
                attribute="forward",
                is_own=False,
            )
        )
    return products


def made_up_changes(
    products: list[Product], seed: int, dtype: torch.dtype, ranks: Sequence[int] = RANKS
) -> dict[int, list[PartChange]]:
    """Changes of some parts, of all kinds."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    changes: dict[int, list[PartChange]] = {}
    for product in products:
        for part in product.parts:
            kind = rng.choice(["none", "lora", "lora", "bias", "dora", "gain", "input gain"])
            if product.kind == "embedding":
                kind = "lora"
            rank = rng.choice(ranks)
            change = PartChange(part.start, part.size)
            if kind in {"lora", "bias", "dora"}:
                change = PartChange(
                    part.start,
                    part.size,
                    (normal(rank, product.in_features) * 0.1).to(dtype),
                    (normal(part.size, rank) * 0.3).to(dtype),
                    scale=rng.choice([0.5, 2.0]),
                    gain=normal(part.size) if kind == "dora" else None,
                    bias=normal(part.size) if kind != "lora" else None,
                )
            elif kind == "gain":
                change = PartChange(part.start, part.size, gain=normal(part.size))
            elif kind == "input gain":
                change = PartChange(part.start, part.size, input_gain=normal(product.in_features))
            if kind != "none":
                changes.setdefault(product.index, []).append(change)
    return changes


def outputs_of(
    backend: AdapterBackend, adapters: Sequence[AdapterWeights | None], counts: Sequence[int]
) -> list[torch.Tensor]:
    """The outputs of all products over random rows, the same for each call; every third row is kept."""
    generator = torch.Generator().manual_seed(5)
    num_rows = sum(counts)
    kept = [adapter for adapter, count in zip(adapters, counts, strict=True) for _ in range(count)][::3]
    outputs = []
    with backend.adapting(AdaptedRows(adapters, counts), AdaptedRows(kept, [1] * len(kept))):
        for product in backend.products:
            if product.kind == "embedding":
                given = torch.randint(0, 31, (1, num_rows), generator=generator)
            else:
                rows = len(kept) if product.is_head else num_rows
                dtype = next(product.module.parameters()).dtype
                given = torch.randn(1, rows, product.in_features, generator=generator).to(dtype)
            outputs.append(product.module(given.to(backend.device)))
    return outputs
