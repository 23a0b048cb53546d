"""Environment variables of an engine's process.

They have to be set before torch, OpenMP and oneDNN are loaded, so this module imports none of them. The device is not
known by then ("auto"): on a GPU the variables of the CPU's products do no harm.
"""

from __future__ import annotations

from collections.abc import Mapping

SPIN_COUNT = "3000"
"""Turns (some 10 us) that torch's OpenMP threads wait actively before they sleep; libgomp's own are milliseconds.

Where another process needs one of the cores, a thread that spins keeps the one it waits for from running;
``benchmarks/spinning.py`` shows by how much.
"""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Makes torch ask for pages of 2 MiB: blocks lie all over the cache, and finding each one's pages takes as long as
reading it."""

PRODUCT_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Where torch and oneDNN keep what they have compiled for a product: some 0.5 MiB for each number of rows and layer's
shape, and 1,024 of them by default."""

MOST_PRODUCTS = "384"
"""For five shapes all numbers of rows of decodes, and the last of prefills."""


def threads_and_memory(given: Mapping[str, str]) -> dict[str, str]:
    """Variables for threads and memory.

    Args:
        given: The environment of the process that starts the engine. A variable that the operator has set stays.
    """
    chosen = {HUGE_PAGES: "1", **dict.fromkeys(PRODUCT_CACHES, MOST_PRODUCTS)}
    if "OMP_WAIT_POLICY" not in given:
        chosen["GOMP_SPINCOUNT"] = SPIN_COUNT
    return {name: value for name, value in chosen.items() if name not in given}
