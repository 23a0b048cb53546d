"""Slices of rows that bound the memory of operations on [rows, vocabulary]."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

SLICE_BYTES = 32 * 1024 * 1024
"""Maximum size of a slice in float32. The sampler has up to seven buffers of this size at once. Smaller slices would
leave a GPU idle between launches."""


def row_slices(rows: SequenceOf[int], vocabulary: int, *, divisor: int = 1) -> Iterator[SequenceOf[int]]:
    """Split rows into slices of at least one row.

    Args:
        rows: The rows.
        vocabulary: Width of a row.
        divisor: Divides the maximum size, for operations with larger buffers.
    """
    size = max(1, SLICE_BYTES // divisor // (4 * vocabulary))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
