"""The kernels compile for GPUs, without one, and fetch keys ahead within the GPU's shared memory and registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

SHARED = 99 * 1024
"""Bytes of shared memory of a program on a GeForce RTX 30 or 40; an A100 or H100 has more."""


def compile_kernels(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.engine.compile_kernels", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dims"),
    [
        ("90", "bfloat16", ["64", "128"]),
        ("90", "float32", ["128"]),
        ("80", "bfloat16", ["128"]),
        pytest.param("90", "bfloat16", ["80", "96", "192", "256"], marks=pytest.mark.slow),
        pytest.param("90", "float16", ["64", "80", "96", "128", "192", "256"], marks=pytest.mark.slow),
        pytest.param("90", "float32", ["64", "80", "96", "192", "256"], marks=pytest.mark.slow),
        pytest.param("80", "bfloat16", ["64", "80", "96", "192", "256"], marks=pytest.mark.slow),
        pytest.param("80", "float16", ["64", "80", "96", "128", "192", "256"], marks=pytest.mark.slow),
        pytest.param("80", "float32", ["64", "80", "96", "128", "192", "256"], marks=pytest.mark.slow),
    ],
)
def test_keys_are_fetched_ahead_without_spilled_registers(
    capability: str, dtype: str, head_dims: list[str], tmp_path: Path
) -> None:
    """Both forms of the kernel, with everything that a layer can have: the ones that need the most registers."""
    built = compile_kernels(tmp_path, "--capabilities", capability, "--dtypes", dtype, "--head-dims", *head_dims)
    assert [(one["kernel"], one.get("IS_LISTED")) for one in built] == [
        ("store", None),
        ("attend", False),
        ("attend", True),
        ("combine", False),
        ("combine", True),
    ] * len(head_dims)
    for one in built:
        assert one["spilled"] == 0, one
        assert one["shared"] <= SHARED, one
        if one["kernel"] == "attend":
            assert one["buffers"] >= 2, one
            assert one["in_flight"] >= 2, one  # the keys and the values of the next tile


def test_the_check_notices_spilled_registers_and_late_fetches(tmp_path: Path) -> None:
    arguments = ["--capabilities", "80", "--dtypes", "bfloat16", "--head-dims", "128", "--tiling"]
    built = compile_kernels(tmp_path, *arguments, "128", "128", "4", "1")
    attended = [one for one in built if one["kernel"] == "attend"]
    assert len(attended) == 2
    assert all(one["spilled"] > 0 and one["in_flight"] == 0 and one["buffers"] < 2 for one in attended)


@pytest.mark.slow
def test_heads_wider_than_the_table_compile(tmp_path: Path) -> None:
    arguments = ["--capabilities", "80", "--dtypes", "bfloat16", "float32", "--head-dims", "512"]
    built = compile_kernels(tmp_path, *arguments)
    assert len(built) == 10
    assert all(one["shared"] <= SHARED for one in built)
