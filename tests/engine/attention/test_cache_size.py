"""Too little memory for one sequence: the message says what would fit."""

from __future__ import annotations

import re

import pytest
import torch

from server.engine.attention.kv_cache import KVCacheSpec, num_blocks_for

SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype=torch.float32)


def num_blocks(max_model_len: int, num_bytes: int) -> int:
    return num_blocks_for(
        SPEC, memory=num_bytes, free_memory=lambda: (0, 0.0), max_model_len=max_model_len, max_num_seqs=1
    )


@pytest.mark.parametrize("blocks", [3, 5, 17])
def test_the_length_that_would_fit_fits(blocks: int) -> None:
    with pytest.raises(
        ValueError, match=r"1000 positions needs .* lower --max-model-len; \d+ positions would fit$"
    ) as error:
        num_blocks(1000, blocks * SPEC.block_bytes)
    fitting = int(re.findall(r"(\d+) positions would fit", str(error.value))[0])
    assert num_blocks(fitting, blocks * SPEC.block_bytes) == blocks
    assert fitting > (blocks - 3) * SPEC.block_size


def test_nothing_is_promised_if_nothing_fits() -> None:
    with pytest.raises(ValueError, match="lower --max-model-len$"):
        num_blocks(1000, SPEC.block_bytes - 1)
