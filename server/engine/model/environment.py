"""Environment variables of the engine process.

They have to be set before torch, OpenMP and oneDNN are loaded, so this module imports none of them. The device is not
known yet ("auto"); on a GPU the CPU's variables have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping

SPIN_COUNT = "3000"
"""Iterations (about 10 us) that torch's OpenMP threads spin before they sleep; libgomp's default takes milliseconds.

If another process needs a core, a spinning thread keeps the thread that it waits for from running; see
``benchmarks/spinning.py``.
"""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Makes torch request pages of 2 MiB. Blocks are scattered over the cache, and with small pages address translation
takes as long as reading a block."""

KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(512 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}
"""Lets glibc keep the memory of released tensors, up to these sizes in bytes. By default it returns the large tensors
of a prefill step to the system, which then clears the same pages again for each layer."""

PRODUCT_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Capacities of torch's and oneDNN's caches of compiled products: about 0.5 MiB for each number of rows and shape,
and 1,024 entries by default."""

MAX_PRODUCTS = "384"
"""Enough for five shapes with all batch sizes of decodes, and the latest prefills."""


def threads_and_memory(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for threads and memory.

    Args:
        environment: The environment of the process that starts the engine. Variables in it are not overridden.
    """
    chosen = {HUGE_PAGES: "1", **KEPT_MEMORY, **dict.fromkeys(PRODUCT_CACHES, MAX_PRODUCTS)}
    if "OMP_WAIT_POLICY" not in environment:
        chosen["GOMP_SPINCOUNT"] = SPIN_COUNT
    return {name: value for name, value in chosen.items() if name not in environment}
