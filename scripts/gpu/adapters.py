"""The kernels of adapters against torch's operations, and decode steps over many adapters against bare ones."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.adapter_parts.files import write_adapter
from scripts.gpu.driving import running, step_seconds
from scripts.gpu.models import Scale, serving
from scripts.gpu.results import Results
from server.engine.adapters.backend import AdaptedRows, AdapterBackend, PlainAdapters
from server.engine.adapters.products import Product, parts_of
from server.engine.adapters.weights import AdapterWeights, PartChange
from server.engine.cuda.adapter_backend import TritonAdapters

RANK = 16
RANKS = (RANK, 8, 3, 64)
"""Of the compared adapters, in turn."""

COUNTS = (1, 16, 64)
"""Numbers of adapters, of which a step has at most one for each row."""

JUDGED, MOST_SLOWDOWN = 16, 1 / 0.85
"""How much longer a step of 64 rows over 16 adapters may take than a bare one."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2}
"""Allowed difference, as a fraction of the largest output."""

ADAPTER_MEMORY = 8 * 2**30


def run(results: Results, scale: Scale) -> None:
    """Compare, then measure."""
    # NumPy lacks bfloat16, so the interpreter multiplies its bits as integers.
    for dtype in [torch.float32] if scale.is_dry else TOLERANCE:
        for num_rows in (scale.batch, scale.chunk * max(scale.chunks)):
            add_comparison(results, scale, dtype, num_rows)
    add_steps(results, scale)


def add_comparison(results: Results, scale: Scale, dtype: torch.dtype, num_rows: int) -> None:
    """One product of several modules over rows of several adapters and of none."""
    torch.manual_seed(0)
    shape = scale.shape
    sizes = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    product = product_of(shape.hidden, sizes, dtype, scale.device)
    rng = random.Random(num_rows)
    counts = [1] * num_rows if num_rows == scale.batch else [num_rows // 8] * 8
    numbers = [rng.randrange(-1, len(RANKS)) for _ in counts]
    changes = [change_of(product, rank, dtype) for rank in RANKS]
    rows = torch.randn(sum(counts), shape.hidden, dtype=dtype, device=scale.device)
    outputs = []
    for backend in (TritonAdapters([product], scale.device, dtype), PlainAdapters([product], scale.device)):
        weights = [backend.place(backend.pack({0: own})) for own in changes]
        outputs.append(output_of(backend, [None if one < 0 else weights[one] for one in numbers], counts, rows))
    got, want = (output.float() for output in outputs)
    error = ((got - want).abs().max() / want.abs().max()).item()
    name = f"{num_rows} rows, {str(dtype).removeprefix('torch.')}: difference"
    results.add(name, error, at_most=TOLERANCE[dtype])


@torch.inference_mode()
def output_of(
    backend: AdapterBackend, adapters: Sequence[AdapterWeights | None], counts: Sequence[int], rows: torch.Tensor
) -> torch.Tensor:
    """The output of the backend's only product for spans of rows with adapters."""
    with backend.adapting(AdaptedRows(adapters, counts), AdaptedRows([], [])):
        output: torch.Tensor = backend.products[0].module(rows)
    return output


def product_of(in_features: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Product:
    """A product of several modules, with random weights."""
    module = nn.Linear(in_features, sum(sizes), bias=False, dtype=dtype, device=device).requires_grad_(False)
    parts = parts_of([str(number) for number in range(len(sizes))], sizes)
    return Product(
        index=0,
        parts=parts,
        kind="linear",
        in_features=in_features,
        out_features=sum(sizes),
        is_head=False,
        scale=1.0,
        module=module,
        original=module.forward,
        holder=vars(module),
        attribute="forward",
        is_own=False,
    )


def change_of(product: Product, rank: int, dtype: torch.dtype) -> list[PartChange]:
    """Random changes of all modules of a product; of the last one with a gain and a bias, as a DoRA has them."""
    changes = []
    for part in product.parts:
        a = torch.randn(rank, product.in_features) * product.in_features**-0.5
        b = torch.randn(part.size, rank) * rank**-0.5
        is_last = part is product.parts[-1]
        gain, bias = (1 + 0.2 * torch.randn(part.size), torch.randn(part.size)) if is_last else (None, None)
        changes.append(PartChange(part.start, part.size, a.to(dtype), b.to(dtype), 0.5, gain, bias))
    return changes


def add_steps(results: Results, scale: Scale) -> None:
    """Decode steps over no, one, and many adapters of rank 16 on all linear layers, in turn."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(scale, adapter_host_bytes=ADAPTER_MEMORY, adapter_device_bytes=ADAPTER_MEMORY) as engine,
    ):
        off = engine.model.adapters_off
        results.add("adapters are served", float(off is None), at_least=1, note=off or "")
        if off is not None:
            return
        least = None if scale.is_dry else 1.0
        results.add("steps with adapters are recorded", float(engine.runner.records_adapters), at_least=least)
        scale.shape.config(scale.max_model_len).save_pretrained(folder)
        files = write_adapter(Path(folder), Path(folder, "adapter"), rank=RANK)
        counts = [0, *sorted({min(count, scale.batch) for count in COUNTS})]
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for turn in range(scale.rounds + 1):
            for count in counts:
                sources = [files.source(str(number)) for number in range(count)]
                with running(engine, scale, scale.batch, adapters=sources) as stepper:
                    spent = step_seconds(stepper.step, scale, scale.steps)
                if turn:  # the first turn warms up, and reads the files
                    seconds[count].append(spent)
    for count in counts:
        spent = 1000 * statistics.median(seconds[count])
        results.add_speed(f"step of {scale.batch} over {count} adapters", spent, "ms", is_detail=count > 0)
    for count in counts[1:]:
        slowdown = statistics.median(one / none for one, none in zip(seconds[count], seconds[0], strict=True))
        most = MOST_SLOWDOWN if count == JUDGED else None
        results.add_speed(f"{count} adapters over none", slowdown, "", at_most=most)
