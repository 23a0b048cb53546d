"""Numerical comparison of the trained rows of two soft prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prompt_store.files.numerics import rows_of
from prompt_store.files.tensors import read_tensors
from prompt_store.types import ROWS_TENSOR, TensorData

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class VectorDifference:
    """Two vectors.

    Attributes:
        cosine: Cosine of the angle between them, -1 to 1; 0 if one of them is zero.
        norms: Their Euclidean norms.
    """

    cosine: float
    norms: tuple[float, float]


@dataclass(frozen=True, slots=True)
class RowDifference:
    """One virtual token in both soft prompts.

    Attributes:
        row: The whole row.
        layers: For keys and values: the keys and the values of each layer. Empty for embeddings.
    """

    row: VectorDifference
    layers: tuple[tuple[VectorDifference, VectorDifference], ...]


def compare_rows(before: Path, after: Path, *, num_layers: int) -> list[RowDifference] | None:
    """Compare the virtual tokens that two weights files both have, in order.

    Args:
        before: A weights file with ``prompt_embeddings`` [virtual tokens, width].
        after: Another one.
        num_layers: Layers of keys and values in a row, each with keys first; 0 for embeddings.

    Returns:
        One entry for each virtual token of the shorter one; None if the rows have different widths.

    Raises:
        OSError: If a file cannot be read.
    """
    ours, theirs = (read_tensors(path)[ROWS_TENSOR] for path in (before, after))
    if ours.shape[-1] != theirs.shape[-1]:
        return None
    count = min(ours.shape[0], theirs.shape[0])
    return [
        RowDifference(_difference(one, other), tuple(_layers(one, other, num_layers)))
        for one, other in zip(_rows(ours, count), _rows(theirs, count), strict=True)
    ]


def _rows(tensor: TensorData, count: int) -> Iterator[npt.NDArray[np.float64]]:
    for start in range(0, count, _ROWS_AT_ONCE):
        yield from rows_of(tensor, start, min(_ROWS_AT_ONCE, count - start)).astype(np.float64)


def _layers(
    one: npt.NDArray[np.float64], other: npt.NDArray[np.float64], num_layers: int
) -> Iterator[tuple[VectorDifference, VectorDifference]]:
    if not num_layers:
        return
    parts = [row.reshape(num_layers, 2, -1) for row in (one, other)]
    for ours, theirs in zip(*parts, strict=True):
        yield _difference(ours[0], theirs[0]), _difference(ours[1], theirs[1])


def _difference(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> VectorDifference:
    norms = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    product = norms[0] * norms[1]
    cosine = float(np.dot(one, other)) / product if product else 0.0
    return VectorDifference(max(-1.0, min(1.0, cosine)), norms)
