"""Compile the kernels of adapters for GPUs, without one, and print a line of JSON per kernel.

    python -m tests.support.engine.compile_adapter_kernels --capabilities 80 90

It runs in a separate process, because the tests' process uses Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.adapters.backend import AdaptedRows
from server.engine.adapters.products import Product, parts_of
from server.engine.adapters.weights import PartChange
from server.engine.cuda import adapter_kernels
from server.engine.cuda.adapter_backend import TritonAdapters
from tests.support.engine.compile_layer_kernels import _resources

NAMES = {torch.int64: "i64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Recorded:
    """A kernel that is compiled instead of launched, once for each specialisation.

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
        given = dict(zip(names, arguments, strict=False))
        signature = {name: _type_of(argument) for name, argument in given.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        divisible = [
            name
            for name, argument in given.items()
            if (name in {"rows", "out"} if isinstance(argument, torch.Tensor) else name in {"width", "out_width"})
        ]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        source = ASTSource(self._kernel, signature, constants, attributes)
        for capability in self._capabilities:
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
            found = {
                "kernel": self._kernel.__name__,
                "capability": capability,
                "dtype": signature["rows" if "rows" in signature else "out"],
                "shared": built.metadata.shared,
                "copies": built.asm["ttgir"].count("async_copy_global_to_local"),
                **_resources(built.asm["ptx"], capability),
                **constants,
            }
            print(json.dumps(found), flush=True)  # noqa: T201 - it is a command


def _type_of(argument: object) -> str:
    return f"*{NAMES[argument.dtype]}" if isinstance(argument, torch.Tensor) else "i32"


def _product(index: int, module: nn.Module, kind: str, sizes: list[int], num_in: int) -> Product:
    parts = parts_of([f"m{number}" for number in range(len(sizes))], sizes)
    shape = kind, num_in, sum(sizes)
    return Product(index, parts, *shape, False, 1.0, module, module.forward, vars(module), "forward", is_own=False)


@torch.inference_mode()
def main(capabilities: list[int], dtypes: list[str]) -> None:
    device = torch.device("cpu")
    for dtype in (getattr(torch, name) for name in dtypes):
        products = [
            _product(0, nn.Linear(512, 384, dtype=dtype), "linear", [256, 64, 64], 512),
            _product(1, nn.Embedding(64, 512, dtype=dtype), "embedding", [512], 64),
        ]
        backend = TritonAdapters(products, device, dtype)
        names = {name: Recorded(getattr(adapter_kernels, name), capabilities) for name in ("shrink", "expand")}
        fields = {name: getattr(adapter_kernels, name) for name in dir(adapter_kernels) if name.isupper()}
        backend._kernels = SimpleNamespace(**fields, **names)  # type: ignore[assignment]
        changes = {
            index: [
                PartChange(part.start, part.size, torch.zeros(8, one.in_features), torch.zeros(part.size, 8))
                for part in one.parts
            ]
            for index, one in enumerate(products)
        }
        weights = backend.place(backend.pack(changes))
        for num_rows in (4, 100):
            with backend.adapting(AdaptedRows([weights], [num_rows]), AdaptedRows([], [])):
                products[0].module(torch.zeros(num_rows, 512, dtype=dtype))
                products[1].module(torch.zeros(num_rows, dtype=torch.int64))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    main(**vars(parser.parse_args()))
