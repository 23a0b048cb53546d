"""Where the connector writes in the caches of vLLM's GPU backends; see ``tests/support/vllm_layouts.py``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.vllm import PYTHON, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
NHD, HND = "LBNHC", "LBHNC"
INTERLEAVED = ("BLHNC", "BLNHC", "BHLNC")
"""The layers of a block lie together; vLLM does not divide such blocks."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str]]:
    command = [PYTHON, "-m", "tests.support.without_gpu", "tests.support.vllm_layouts"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"])
def test_attention_reads_what_the_connector_writes(outcomes: dict[str, dict[str, str]], backend: str) -> None:
    found = outcomes[backend]
    wrong = {name: text for name, text in found.items() if text != "right" and not text.startswith("refused by vLLM")}
    assert wrong == {}
    # In both orders of heads and positions, also where a kernel's blocks are half of the scheduler's.
    right = {name for name, text in found.items() if text == "right"}
    assert {f"{layout}/{parts}" for layout in (NHD, HND) for parts in (1, 2)} <= right
    assert {f"{layout}/1" for layout in INTERLEAVED} <= right
    assert all("LHBNC" in name or name.endswith("/2") for name in found.keys() - right)
