"""Decode steps of the model: against the device's bandwidth, with and without graphs, and what they consist of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from scripts.gpu.device import copy_bandwidth, release
from scripts.gpu.driving import running, step_seconds
from scripts.gpu.models import Scale, serving
from scripts.gpu.results import Results

LEAST_SHARE = 0.6
JUDGED = 64
"""Most sequences for which the share of the bandwidth is judged: with more, products are no longer bound by it."""

PROFILED_STEPS = 5
SHOWN = 4
"""Groups of kernels in the table."""
GROUPS: dict[str, Sequence[str]] = {
    "attention": ("attend", "combine", "scaled_dot_product", "flash", "sdpa"),
    "keys and values": ("store", "index_put", "index_copy", "scatter"),
    "products": ("gemm", "gemv", "cutlass", "nvjet", "cublas", "splitk", "aten::mm", "addmm", "bmm"),
    "copies": ("memcpy", "memset", "copy"),
    "reductions": ("reduce", "argmax", "softmax", "sort", "topk"),
    "element-wise": ("elementwise", "vectorized", "cat", "silu", "mul", "norm", "rope", "rotary", "gate"),
}
"""Groups of kernels by parts of their names; the first that matches counts."""


def run(results: Results, scale: Scale) -> None:
    """Measure the steps."""
    bandwidth = copy_bandwidth(scale.device, scale.copy_bytes)
    for is_eager in (False, True):
        measure(results, scale, bandwidth, is_eager=is_eager)
        release()


def measure(results: Results, scale: Scale, bandwidth: float, *, is_eager: bool) -> None:
    """Measure the steps of one engine; ``bandwidth`` is that of a copy, in bytes per second."""
    with serving(scale, enforce_eager=is_eager, max_num_seqs=max(scale.batches)) as engine:
        if not is_eager:
            backend = type(engine.runner.backend).__name__
            least = None if scale.is_dry else 1.0
            results.add("attention by Triton", float(backend == "TritonBackend"), at_least=least, note=backend)
        for batch in scale.batches[::2] if is_eager else scale.batches:
            with running(engine, scale, batch) as stepper:
                seconds = step_seconds(stepper.step, scale, scale.steps)
            add_step(results, scale, batch, seconds, bandwidth, is_eager=is_eager)
        if not is_eager:
            with running(engine, scale, scale.batch) as stepper:
                add_profile(results, scale, stepper)


def bytes_of_step(scale: Scale, batch: int) -> int:
    """Bytes that a decode step has to read: weights once, and the keys and values of every sequence."""
    numbers = scale.shape.weights_read + batch * scale.context * scale.shape.key_values
    return numbers * scale.dtype.itemsize


def add_step(results: Results, scale: Scale, batch: int, seconds: float, bandwidth: float, *, is_eager: bool) -> None:
    """Add the figures of one batch size.

    Args:
        results: Takes the figures.
        scale: The scale of the check.
        batch: Number of sequences.
        seconds: Of a step.
        bandwidth: Bytes per second of a copy.
        is_eager: Whether the step was launched kernel by kernel.
    """
    name = f"{batch} x {scale.context}" + (", no graphs" if is_eager else "")
    results.add_speed(f"step, {name}", 1000 * seconds, "ms", is_detail=not is_eager)
    if not is_eager:
        share = bytes_of_step(scale, batch) / seconds / bandwidth
        least = LEAST_SHARE if batch <= JUDGED else None
        results.add_speed(
            f"share of the copy's bandwidth, {name}", share, "", at_least=least, note=f"{1000 * seconds:.2f} ms"
        )


def group_of(name: str) -> str:
    """The group of a kernel."""
    lowered = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lowered for part in parts)), "other")


def add_profile(results: Results, scale: Scale, stepper: Any) -> None:
    """Add the time on the device of each group of kernels, and of the largest kernels."""
    activities = [ProfilerActivity.CPU] if scale.is_dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        seconds = step_seconds(stepper.step, scale, PROFILED_STEPS)
    by_name: dict[str, float] = {}
    for event in profiled.key_averages():
        is_kernel = scale.is_dry or str(event.device_type).endswith("CUDA")
        spent = event.self_cpu_time_total if scale.is_dry else event.self_device_time_total
        if is_kernel and spent:
            by_name[event.key] = by_name.get(event.key, 0.0) + spent / PROFILED_STEPS / 1000
    by_group: dict[str, float] = {}
    for name, spent in by_name.items():
        by_group[group_of(name)] = by_group.get(group_of(name), 0.0) + spent
    where = "on the CPU" if scale.is_dry else ""
    for rank, (group, spent) in enumerate(sorted(by_group.items(), key=lambda item: -item[1])):
        results.add_speed(f"profile of {scale.batch}: {group}", spent, "ms", is_detail=rank >= SHOWN, note=where)
    results.add_speed(f"profile of {scale.batch}: a step", 1000 * seconds, "ms", is_detail=True)
    for name, spent in sorted(by_name.items(), key=lambda item: -item[1])[:15]:
        results.add_speed(f"kernel {name[:100]}", spent, "ms", is_detail=True)
