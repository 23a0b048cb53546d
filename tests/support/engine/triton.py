"""The device for tests of Triton's kernels, and the tested modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

import triton.language as tl

from server.engine.cuda import triton_attention, triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""On CPUs the kernels run in Triton's interpreter (tests/conftest.py)."""

if DEVICE.type == "cpu":
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _dot = InterpreterBuilder.create_dot

    def _widened(tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot_of_bfloat16(self: Any, a: Any, b: Any, *others: Any) -> Any:
        """Widen bfloat16 first: NumPy lacks it, so the interpreter would multiply its bits as integers."""
        return _dot(self, _widened(a), _widened(b), *others)

    _cast = InterpreterBuilder.cast_impl

    def _cast_to_nearest(self: Any, source: Any, kind: Any) -> Any:
        """Round float32 to the nearest bfloat16, as GPUs do; the interpreter drops the last bits."""
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return _cast(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = _dot_of_bfloat16
    InterpreterBuilder.cast_impl = _cast_to_nearest

__all__ = ["DEVICE", "triton_attention", "triton_kernels"]
