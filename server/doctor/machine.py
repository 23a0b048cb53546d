"""Checks of processor, memory and GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from server.doctor.findings import Finding, failed, ok, warning
from server.engine.host_memory import available_host_memory

GIB = 1024**3
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
_FAST_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
_SMALL_MEMORY = 2 * GIB
_SMALL_GPU_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Device:
    """The device that ``--device auto`` chooses.

    Attributes:
        name: ``cpu`` or ``cuda``.
        free_bytes: Memory that is free on it.
        has_bfloat16: Whether products in bfloat16 are fast.
    """

    name: str
    free_bytes: int
    has_bfloat16: bool


def inspect_machine(cpu_info: Path = Path("/proc/cpuinfo")) -> tuple[Device, list[Finding]]:
    """Look at processor, memory and GPU.

    Args:
        cpu_info: The kernel's description of the processors.

    Returns:
        The device that would serve, and the findings.
    """
    features, model = _cpu(cpu_info)
    has_bfloat16 = bool(features & _FAST_BFLOAT16)
    findings = [_cpu_finding(features, model, has_bfloat16=has_bfloat16)]
    free = available_host_memory()
    text = f"{free / GIB:.1f} GiB of host memory are available"
    if free < _SMALL_MEMORY:
        findings.append(warning("memory", text, "stop other programs, or give the container more memory"))
    else:
        findings.append(ok("memory", text))
    gpu, of_gpu = _gpu()
    return gpu or Device("cpu", free, has_bfloat16), findings + of_gpu


def _cpu(cpu_info: Path) -> tuple[frozenset[str], str]:
    """The features of the processor that matter here, and its name."""
    features: frozenset[str] = frozenset()
    model = platform.processor() or platform.machine()
    if cpu_info.exists():
        for line in cpu_info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "flags":
                features = frozenset(value.split()) & frozenset(_FEATURES)
            elif key.strip() == "model name":
                model = value.strip()
    return features, model


def _cpu_finding(features: frozenset[str], model: str, *, has_bfloat16: bool) -> Finding:
    cores = len(os.sched_getaffinity(0))
    shown = ", ".join(name for name in _FEATURES if name in features) or "no vector extension that is used here"
    served = "bfloat16 models are served in bfloat16" if has_bfloat16 else "bfloat16 models are served in float32"
    text = f"{model}, {cores} core{'s' if cores > 1 else ''}, {shown}; on this processor {served}"
    if "avx2" not in features and platform.machine() in {"x86_64", "AMD64"}:
        return warning("processor", text, "serve on a processor with AVX2 or newer, or on a GPU")
    return ok("processor", text)


def _gpu() -> tuple[Device | None, list[Finding]]:
    driver = _driver()
    try:
        import torch  # noqa: PLC0415 - a missing torch is a finding of its own
    except ImportError as error:
        return None, [failed("gpu", f"torch cannot be imported: {error}", "pip install torch")]
    if not torch.cuda.is_available():
        if driver is None:
            return None, [ok("gpu", "no NVIDIA GPU; the processor serves")]
        if torch.version.cuda is None:
            text = f"a GPU with driver {driver} is there, but torch {torch.__version__} is a build for processors"
            return None, [
                warning("gpu", text, "pip install torch --index-url https://download.pytorch.org/whl/cu130")
            ]
        text = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU; the driver is {driver}"
        return None, [warning("gpu", text, "update the driver, or in a container start it with --gpus all")]
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    name, major, minor = properties.name, properties.major, properties.minor
    text = (
        f"{name}, compute capability {major}.{minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
        f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    )
    device = Device("cuda", free, major >= 8)
    if major < 8:
        return device, [warning("gpu", text, "bfloat16 needs compute capability 8.0; use --dtype float16")]
    if free < total * _SMALL_GPU_SHARE:
        return device, [
            warning("gpu", text, "other processes use the GPU: stop them, or see --gpu-memory-utilization")
        ]
    return device, [ok("gpu", text)]


def _driver() -> str | None:
    """The version of NVIDIA's driver; None if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None
