"""Compile the Triton kernels for GPUs, without one, and print a line of JSON per kernel.

The line has what Triton and its assembler say of the kernel: bytes of shared memory, registers, bytes of spilled
registers, the number of buffers for the tiles of keys and values, and the copies in flight while a program waits for
a tile.

    python -m tests.support.engine.compile_kernels --capabilities 80 90 --dtypes bfloat16 --head-dims 64 128

It runs in a separate process, because the tests' process uses Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.attention.backend import AttentionCall, make_metadata
from server.engine.cuda import triton_attention, triton_kernels
from server.engine.cuda.attention_plan import Tiling
from server.engine.cuda.triton_attention import TritonBackend
from tests.support.engine.caches import CPU, make_cache

NAMES = {torch.int64: "i64", torch.int32: "i32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Launches:
    """A kernel that records its launches instead of running."""

    def __init__(self, kernel: Any) -> None:
        self.kernel: Any = kernel
        self.launches: list[tuple[tuple[object, ...], dict[str, Any]]] = []

    def __getitem__(self, _grid: object) -> Any:
        return lambda *arguments, **named: self.launches.append((arguments, named))

    def compile(self, capability: int) -> None:
        """Compile the kernel for each launch, and print a line of JSON each."""
        for arguments, named in self.launches:
            options = {key: named[key] for key in ("num_warps", "num_stages") if key in named}
            constants = {key: value for key, value in named.items() if key not in options}
            signature = dict(zip(self.kernel.arg_names, map(_type_of, arguments), strict=False))
            signature |= dict.fromkeys(constants, "constexpr")
            # The cache and the buffers of a launch are aligned; other arguments are not specialised for alignment.
            aligned = {"keys", "values", "parts"} & signature.keys()
            attributes = {(self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
            source = ASTSource(self.kernel, signature, constants, attributes)
            started = time.perf_counter()
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            found = {
                "kernel": self.kernel.__name__,
                "capability": capability,
                "shared": built.metadata.shared,
                **_pipeline(built.asm["ttgir"]),
                **_resources(built.asm["cubin"]),
                "seconds": round(time.perf_counter() - started, 1),
                **{key: value for key, value in constants.items() if key in {"HEAD_DIM", "LANES", "IS_LISTED"}},
                "dtype": signature.get("query", signature.get("keys", "")),
            }
            print(json.dumps(found), flush=True)  # noqa: T201 - it is a command


def _pipeline(ttgir: str) -> dict[str, int]:
    """The fewest buffers of keys or of values, and the copies in flight during the first wait of the loop.

    Tiles are copied to shared memory while others are computed, if there are two or more buffers of each, and if the
    program does not wait for the copies of later tiles.
    """
    buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", ttgir)
    _, _, loop = ttgir.partition("scf.for")
    waits = re.findall(r"async_wait .*?num = (\d+)", loop)
    return {"buffers": min(map(int, buffers), default=0), "in_flight": int(waits[0]) if waits else 0}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, to which the assembler spills registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def _type_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{NAMES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def main(capabilities: list[int], dtypes: list[str], head_dims: list[int], tiling: list[int] | None) -> None:
    if tiling is not None:
        vars(triton_attention)["choose_tiling"] = lambda *_, **__: Tiling(*tiling)
    for name, head_dim in itertools.product(dtypes, head_dims):
        dtype = getattr(torch, name)
        backend = TritonBackend(
            make_cache(dtype, block_size=16, num_blocks=64, head_dim=head_dim), num_processors=132
        )
        kernels = {name: Launches(getattr(triton_kernels, name)) for name in ("store", "attend", "combine")}
        backend._kernels = mock.Mock(**kernels)
        call = AttentionCall(0.1, 1000, 30.0, torch.zeros(8, dtype=dtype))
        for spans in ([(list(range(64)), 1000, 1)], [(list(range(64)), 1000, 1), (list(range(64)), 900, 100)]):
            metadata = make_metadata(spans, 16, CPU)
            rows = torch.zeros(metadata.groups[-1].stop, 10, head_dim, dtype=dtype).transpose(0, 1)
            backend.attend(rows[:8], 0, metadata, call)
        backend.store(rows[:2], rows[2:4], 0, metadata)
        for capability, kernel in itertools.product(capabilities, kernels.values()):
            kernel.compile(capability)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--tiling", type=int, nargs=4, help="lanes, keys, warps and stages of all tiles")
    main(**vars(parser.parse_args()))
