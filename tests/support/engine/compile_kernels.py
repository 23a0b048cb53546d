"""Compile the kernels for GPUs that need not be here, and print what came of each.

    python -m tests.support.engine.compile_kernels --capabilities 80 90 --dtypes bfloat16 --head-dims 64 128

A process of its own, for that of the tests has Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.attention.backend import AttentionCall, make_metadata
from server.engine.attention.kv_cache import KVCache, KVCacheSpec
from server.engine.cuda import triton_kernels
from server.engine.cuda.triton_attention import TritonBackend

NAMES = {torch.int64: "i64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CPU = torch.device("cpu")


class Launches:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.made: list[tuple[tuple[object, ...], dict[str, Any]]] = []

    def __getitem__(self, _grid: object) -> Any:
        return lambda *arguments, **named: self.made.append((arguments, named))

    def compile(self, capability: int) -> None:
        """Compile for each launch, and print what came of it as a line of JSON."""
        for arguments, named in self.made:
            options = {key: named[key] for key in ("num_warps", "num_stages") if key in named}
            constants = {key: value for key, value in named.items() if key not in options}
            signature = dict(zip(self.kernel.arg_names, map(_type_of, arguments), strict=False))
            signature |= dict.fromkeys(constants, "constexpr")
            # The cache and what is allocated for a launch are aligned; the rest is not specialised for it.
            aligned = {"keys", "values", "parts", "maxima", "sums"} & signature.keys()
            attributes = {(self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
            source = ASTSource(self.kernel, signature, constants, attributes)
            started = time.perf_counter()
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            found = {
                "kernel": self.kernel.__name__,
                "capability": capability,
                "shared": built.metadata.shared,
                "cubin": len(built.asm["cubin"]),
                "seconds": round(time.perf_counter() - started, 1),
                **{key: value for key, value in constants.items() if key in {"HEAD_DIM", "LANES", "IS_SPLIT"}},
                "dtype": signature.get("query", signature.get("keys", "")),
            }
            print(json.dumps(found), flush=True)  # noqa: T201 - it is a command


def _type_of(argument: object) -> str:
    if isinstance(argument, torch.Tensor):
        return f"*{NAMES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def main(capabilities: list[int], dtypes: list[str], head_dims: list[int]) -> None:
    for name, head_dim in itertools.product(dtypes, head_dims):
        dtype = getattr(torch, name)
        cache = KVCache(KVCacheSpec(1, 2, head_dim, 16, dtype), 128, CPU)
        backend = TritonBackend(cache)
        backend.close()
        kernels = {name: Launches(getattr(triton_kernels, name)) for name in ("store", "attend", "combine")}
        backend._kernels = mock.Mock(**kernels)
        metadata = make_metadata([(list(range(64)), 1000, 1), (list(range(64)), 900, 100)], 16, CPU)
        rows = torch.zeros(101, 10, head_dim, dtype=dtype).transpose(0, 1)
        backend.store(rows[:2], rows[2:4], 0, metadata)
        backend.attend(rows[:8], 0, metadata, AttentionCall(0.1, 50, 30.0, torch.zeros(8, dtype=dtype)))
        for capability, kernel in itertools.product(capabilities, kernels.values()):
            kernel.compile(capability)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    main(**vars(parser.parse_args()))
