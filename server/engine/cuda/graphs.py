"""CUDA graphs of decode steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class CUDARecorder:
    """Records CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function; returns a function that replays it. See ``decode_batch.Recorder``.

        The function runs once first: kernels are compiled in their first run, and a function that waits for the
        device must not be captured, because torch does not always recover from a capture that fails.

        Raises:
            RuntimeError: If the function waits for the device, and so cannot be recorded, or if its capture fails.
                After a failed capture, check that the device can still be used.
        """
        with _waiting_raises():
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        cause: Exception | None = None
        try:
            # Other threads may use the device during the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    function()
                except Exception as error:
                    cause = error  # ending the capture may raise another error, which says less
                    raise
        except Exception as error:
            cause = cause or error
            raise RuntimeError(f"the capture failed ({type(cause).__name__}: {cause})") from error
        finally:
            # If the capture cannot be ended, torch.cuda.graph does not restore the stream.
            torch.cuda.set_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay


@contextmanager
def _waiting_raises() -> Iterator[None]:
    """Let operations that wait for the device raise, in all threads; torch detects nearly all of them."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
