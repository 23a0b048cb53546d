"""Matrix products beside a busy process, by how long torch's threads spin before they sleep.

    python -m benchmarks.spinning

libgomp's threads wait actively for each other for milliseconds by default. Where somebody else uses one of the cores,
a thread that spins keeps the one that it waits for from running. Products of 64 rows on all cores are timed with
nobody else there and beside one process that counts, for each of some settings of ``GOMP_SPINCOUNT``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

SETTINGS = ("default", "0", "1000", "3000", "10000", "100000")
ROUNDS = 3

_PRODUCTS = """
import time, torch
x, w = torch.randn(64, 576), torch.randn(1536, 576)
torch.nn.functional.linear(x, w)
started = time.perf_counter()
for _ in range(300):
    torch.nn.functional.linear(x, w)
print((time.perf_counter() - started) / 300)
"""


def products(setting: str) -> float:
    """Mean seconds of a product in a process of its own."""
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
