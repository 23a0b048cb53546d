"""Comparison of trained rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from prompt_store.files.comparison import compare_rows


def weights(folder: Path, name: str, rows: npt.NDArray[np.floating]) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({"prompt_embeddings": rows}, path)
    return path


def test_rows_are_compared_by_angle_and_norm(tmp_path: Path) -> None:
    one = weights(tmp_path, "one", np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], np.float32))
    other = weights(tmp_path, "other", np.array([[3.0, 4.0], [0.0, 2.0]], np.float16))
    found = compare_rows(one, other, num_layers=0)
    assert found is not None
    assert [(row.row.cosine, row.row.norms, row.layers) for row in found] == [
        (pytest.approx(1.0), (5.0, 5.0), ()),
        (0.0, (1.0, 2.0), ()),
    ]
    zero = compare_rows(one, one, num_layers=0)
    assert zero is not None
    assert zero[2].row.cosine == 0.0


def test_keys_and_values_are_compared_by_layer(tmp_path: Path) -> None:
    rows = np.zeros((1, 8), np.float32)
    rows[0] = [1, 0, 2, 0, 0, 3, 0, 4]  # two layers of keys and values, two wide
    changed = rows.copy()
    changed[0, 2:4] = [0, 2]
    changed[0, 6:8] = [0, -4]
    found = compare_rows(weights(tmp_path, "a", rows), weights(tmp_path, "b", changed), num_layers=2)
    assert found is not None
    cosines = [(keys.cosine, values.cosine) for keys, values in found[0].layers]
    assert cosines == [(1.0, 0.0), (1.0, -1.0)]
    assert [(keys.norms, values.norms) for keys, values in found[0].layers] == [
        ((1.0, 1.0), (2.0, 2.0)),
        ((3.0, 3.0), (4.0, 4.0)),
    ]


def test_rows_of_different_widths_are_not_compared(tmp_path: Path) -> None:
    narrow, wide = np.ones((1, 2), np.float32), np.ones((1, 3), np.float32)
    assert compare_rows(weights(tmp_path, "a", narrow), weights(tmp_path, "b", wide), num_layers=0) is None


def test_bfloat16_rows_are_read(tmp_path: Path) -> None:
    rows = np.array([[1.5, -2.0]], np.float32)
    path = tmp_path / "bf16.safetensors"
    upper_halves = (rows.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = b'{"prompt_embeddings":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + upper_halves)
    found = compare_rows(weights(tmp_path, "f32", rows), path, num_layers=0)
    assert found is not None
    assert found[0].row.norms == (2.5, 2.5)
