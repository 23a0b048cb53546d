"""What the device reaches without the engine: copies, products, and nodes of a graph."""

from __future__ import annotations

import importlib
import platform

import torch
import transformers

from scripts.gpu.device import copy_bandwidth, product_rate, replayed_seconds
from scripts.gpu.models import Scale
from scripts.gpu.results import Results

NODES = 1000


def run(results: Results, scale: Scale) -> None:
    """Measure the ceilings."""
    results.add("versions", note=versions(scale))
    results.add_speed("copy, read and written", copy_bandwidth(scale.device, scale.copy_bytes) / 1e9, "GB/s")
    rate = product_rate(scale.device, scale.dtype, scale.square)
    results.add_speed(f"product of {scale.square} squared", rate / 1e12, "TFLOP/s")
    number = torch.zeros(1, device=scale.device)

    def nodes() -> None:
        for _ in range(NODES):
            number.add_(1)

    note = "launched one by one: there are no graphs on a CPU" if scale.is_dry else ""
    results.add_speed("node of a graph", replayed_seconds(nodes, scale.device) / NODES * 1e6, "us", note=note)


def versions(scale: Scale) -> str:
    """The device, and the versions that the results depend on."""
    device = scale.device.type if scale.is_dry else torch.cuda.get_device_name(scale.device)
    try:
        compiler = f"Triton {importlib.import_module('triton').__version__}"
    except ImportError:
        compiler = "no Triton"
    return (
        f"{device}, Python {platform.python_version()}, torch {torch.__version__}, {compiler}, "
        f"transformers {transformers.__version__}"
    )
