"""CUDA graphs of decode steps."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CUDARecorder:
    """Records CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """As ``decode_batch.Recorder``; the function runs once before, since kernels are compiled in their first run.

        Raises:
            RuntimeError: If the function does what cannot be recorded, such as waiting for the device.
        """
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads do not matter to what this one records.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay
