"""Times of work on the device, and the ceilings of its memory and its products."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 20


def synchronise(device: torch.device) -> None:
    """Wait until the device has computed all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Free the memory of models and caches that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of some work, which is queued and computed once per repeat, after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def replayed_seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of some work in a CUDA graph, without the time to launch it; on a CPU those of ``seconds_of``.

    Args:
        work: Work that may be captured: it does not wait for the device.
        device: The device.
        repeats: Replays that are timed together.
    """
    if device.type != "cuda":
        return seconds_of(work, device, repeats=1)
    work()
    synchronise(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        graph.replay()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second that a copy on the device reads and writes.

    Args:
        device: The device.
        num_bytes: Size of the copied tensor; larger than the caches.
    """
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations per second of a square product of random matrices."""
    left, right = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    return 2 * width**3 / seconds_of(lambda: torch.mm(left, right), device)
