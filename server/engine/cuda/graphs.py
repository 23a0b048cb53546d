"""CUDA graphs of decode steps."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CUDARecorder:
    """Records CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function; returns a function that replays it. See ``decode_batch.Recorder``.

        The function runs once first, because kernels are compiled in their first run.

        Raises:
            RuntimeError: If the function does something that cannot be recorded, such as waiting for the device.
        """
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay
