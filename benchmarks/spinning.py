"""Measure matrix products beside a busy process, for several spin times of torch's threads.

    python -m benchmarks.spinning

By default, the threads of libgomp spin for milliseconds while they wait for each other. If another process uses one
of the cores, a spinning thread can keep the thread that it waits for from running. A sleeping thread, however, must
be woken for the next product. The benchmark times products of 64 rows on all cores, with 60 us of work by one thread
between them, like in a decode step. It does so alone and beside one busy process, for several values of
``GOMP_SPINCOUNT``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

SETTINGS = ("default", "0", "3000", "10000", "30000", "100000")
ROUNDS = 3

_PRODUCTS = """
import time, torch
from torch import nn
from server.engine.cpu.packed_linear import PackedLinear, can_pack
dtype = torch.bfloat16 if can_pack(torch.bfloat16) else torch.float32
x, product = torch.randn(64, 576, dtype=dtype), PackedLinear(nn.Linear(576, 960, dtype=dtype))
taken = 0.0
with torch.inference_mode():
    for turn in range(2100):
        started = time.perf_counter()
        product(x)
        done = time.perf_counter()
        taken += done - started if turn >= 100 else 0.0
        while time.perf_counter() < done + 60e-6:
            pass
print(taken / 2000)
"""


def products(setting: str) -> float:
    """Mean seconds of a product, in a separate process."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if setting != "default":
        environment["GOMP_SPINCOUNT"] = setting
    done = subprocess.run([sys.executable, "-c", _PRODUCTS], env=environment, capture_output=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure and print."""
    times: dict[str, tuple[list[float], list[float]]] = {setting: ([], []) for setting in SETTINGS}
    for _ in range(ROUNDS):
        for setting, (alone, beside) in times.items():
            alone.append(products(setting))
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
                try:
                    beside.append(products(setting))
                finally:
                    busy.kill()
    for setting, (alone, beside) in times.items():
        print(
            f"{setting:>8s}  alone {1e6 * statistics.median(alone):7.0f} us  "
            f"beside a busy process {1e6 * statistics.median(beside):7.0f} us"
        )


if __name__ == "__main__":
    main()
