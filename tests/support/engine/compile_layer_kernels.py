"""Compile the kernels of fused layers for GPUs, without one, and print a line of JSON per kernel.

    python -m tests.support.engine.compile_layer_kernels --capabilities 80 90 --dtypes bfloat16

It runs in a separate process, because the tests' process uses Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.attention.backend import AttentionCall, SDPABackend, make_metadata
from server.engine.cuda.fused_layers import FusedAttention, FusedMLP, FusedRMSNorm, load_kernels
from server.engine.layers.forms import NormForm
from server.engine.layers.layer_probe import AttentionForm, GatedForm
from tests.support.engine.caches import CPU, make_cache

NAMES = {torch.int64: "i64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

WIDTHS = (896, 4096, 8192)
"""Of norms, and of the rows in attention modules."""

SHAPES = ((14, 2, 64), (32, 8, 128), (16, 8, 256))
"""Query heads, key/value heads and the width of a head."""


class Recorded:
    """A kernel that is compiled instead of launched.

    Args:
        kernel: The kernel.
        capabilities: Of the GPUs.
    """

    def __init__(self, kernel: Any, capabilities: list[int]) -> None:
        self._kernel, self._capabilities = kernel, capabilities

    def __getitem__(self, _grid: object) -> Any:
        return self._launch

    def _launch(self, *arguments: object, num_warps: int, **constants: Any) -> None:
        names = self._kernel.arg_names
        tensors = dict(zip(names, arguments, strict=False))
        signature = {name: _type_of(argument) for name, argument in tensors.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = [name for name, kind in signature.items() if kind.startswith("*") and name != "slots"]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(self._kernel, signature, constants, attributes)
        for capability in self._capabilities:
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
            found = {
                "kernel": self._kernel.__name__,
                "capability": capability,
                "dtype": next(iter(signature.values())),
                "cubin": len(built.asm["cubin"]),
                "shared": built.metadata.shared,
                **_resources(built.asm["ptx"], capability),
                **constants,
            }
            print(json.dumps(found), flush=True)  # noqa: T201 - it is a command


def _resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers of a thread, and the bytes that it spills, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{capability}{suffix}", "-o", "/dev/null", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", report)]
    registers = re.search(r"Used (\d+) registers", report)
    assert spills, report
    assert registers is not None, report
    return {"spilled": sum(spills), "registers": int(registers[1])}


def _type_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{NAMES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False)


@torch.inference_mode()
def main(capabilities: list[int], dtypes: list[str]) -> None:
    names = ("rms_norm", "add_and_norm", "gate", "rotate_and_store")
    kernels: Any = SimpleNamespace(**{name: Recorded(getattr(load_kernels(), name), capabilities) for name in names})
    for dtype in (getattr(torch, name) for name in dtypes):
        for width, rounds_first in itertools.product(WIDTHS, (False, True)):
            rows = torch.zeros(4, width, dtype=dtype)
            norm = FusedRMSNorm(NormForm(torch.ones(width), 1e-6, rounds_first), nn.Identity(), kernels)
            norm(rows)
            norm.after_sum(rows, rows.clone())
        for activation in ("silu", "gelu_tanh"):
            parts = {"gate_proj": _linear(8, 3000, dtype), "up_proj": _linear(8, 3000, dtype)}
            mlp = nn.Module()
            for name, part in {**parts, "down_proj": _linear(3000, 8, dtype)}.items():
                mlp.add_module(name, part)
            FusedMLP(mlp, GatedForm(tuple(parts), activation), kernels)(rows[:, :8])
        for (heads, kv_heads, head_dim), has_norms in itertools.product(SHAPES, (False, True)):
            head_norm = NormForm(torch.ones(head_dim), 1e-6, rounds_first=True)
            norms = (head_norm, head_norm) if has_norms else None
            form = AttentionForm(("qkv_proj",), AttentionCall(1.0), heads, kv_heads, head_dim, norms)
            attention: Any = nn.Module()
            attention.layer_idx = 0
            attention.qkv_proj = _linear(8, (heads + 2 * kv_heads) * head_dim, dtype)
            attention.o_proj = _linear(heads * head_dim, 8, dtype)
            fused = FusedAttention(attention, form, kernels)
            backend = SDPABackend(make_cache(dtype, num_kv_heads=kv_heads, head_dim=head_dim))
            fused.bind(backend)
            backend.begin(make_metadata([([0], 0, 4)], 4, CPU))
            angles = torch.zeros(1, 4, head_dim, dtype=dtype)
            fused.attend(rows[:, :8], (angles, angles))
            backend.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    main(**vars(parser.parse_args()))
