"""The division of a device's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.attention.kv_cache import KVCache, KVCacheSpec, max_blocks, min_blocks
from server.engine.attention.memory import GIB, MemoryProfile

SPEC = KVCacheSpec(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16)  # 2 MiB a block
PROFILE = MemoryProfile(total=80 * GIB, outside=GIB, weights=16 * GIB, step=2 * GIB, graphs=GIB)
SIZES = st.integers(0, 40 * GIB)


def test_keys_and_values_take_the_rest() -> None:
    assert PROFILE.needed == 20 * GIB
    num_blocks = PROFILE.num_blocks(SPEC, utilization=0.75, max_model_len=8192, max_num_seqs=256)
    assert num_blocks == 40 * 512 - 1  # the spare block is one more
    assert PROFILE.summary(SPEC, num_blocks) == (
        "memory: 80.00 GiB in total: 16.00 GiB for the weights, 2.00 GiB for the largest step, 1.00 GiB for CUDA "
        "graphs, 1.00 GiB outside of torch (CUDA and other processes), 40.00 GiB for keys and values of 327664 tokens"
    )


def test_memory_for_adapters_is_kept() -> None:
    profile = replace(PROFILE, adapters=GIB)
    assert profile.needed == 21 * GIB
    assert "1.00 GiB for CUDA graphs, 1.00 GiB for adapters, 1.00 GiB outside of torch" in str(profile)
    with pytest.raises(ValueError, match="--max-num-batched-tokens, --adapter-device-memory or --max-num-seqs"):
        profile.num_blocks(SPEC, utilization=0.26, max_model_len=8192, max_num_seqs=256)


def test_no_more_blocks_than_sequences_can_use() -> None:
    assert PROFILE.num_blocks(SPEC, utilization=0.9, max_model_len=160, max_num_seqs=2) == 2 * 2 * 11


def test_too_little_memory_says_what_is_needed_what_there_is_and_what_helps() -> None:
    with pytest.raises(ValueError, match="needs 21.00 GiB") as caught:
        PROFILE.num_blocks(SPEC, utilization=0.26, max_model_len=8192, max_num_seqs=256)
    assert str(caught.value) == (
        "one sequence of 8192 positions needs 21.00 GiB: 16.00 GiB for the weights, 2.00 GiB for the largest step, "
        "1.00 GiB for CUDA graphs, 1.00 GiB outside of torch (CUDA and other processes), 1.00 GiB for keys and "
        "values; 20.80 GiB may be used, 0.26 of 80.00 GiB: raise --gpu-memory-utilization, or lower --max-model-len, "
        "--max-num-batched-tokens or --max-num-seqs"
    )


@given(SIZES, SIZES, SIZES, SIZES, st.floats(0.01, 1.0), st.integers(1, 100_000), st.integers(1, 512))
def test_as_many_blocks_as_fit(
    outside: int, weights: int, step: int, graphs: int, utilization: float, max_model_len: int, max_num_seqs: int
) -> None:
    profile = MemoryProfile(total=141 * GIB, outside=outside, weights=weights, step=step, graphs=graphs)
    usable, least = profile.total * utilization, min_blocks(SPEC, max_model_len)

    def used(num_blocks: int) -> int:
        return outside + weights + step + graphs + (num_blocks + 1) * SPEC.block_bytes

    try:
        num_blocks = profile.num_blocks(
            SPEC, utilization=utilization, max_model_len=max_model_len, max_num_seqs=max_num_seqs
        )
    except ValueError:
        assert used(least) > int(usable)
        return
    assert used(num_blocks) <= usable
    most = max_blocks(SPEC, max_model_len, max_num_seqs)
    assert least <= num_blocks <= most
    assert num_blocks == most or used(num_blocks + 1) > int(usable)


def test_a_resized_cache_is_like_a_new_one() -> None:
    spec = KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=4, block_size=2, dtype=torch.float32)
    cache, other = KVCache(spec, 3, torch.device("cpu")), KVCache(spec, 7, torch.device("cpu"))
    cache.tensor.fill_(1.0)
    cache.resize(7)
    assert (cache.num_blocks, cache.spare_block) == (7, 7)
    assert torch.equal(cache.tensor, other.tensor)
    keys, values = cache.layer(1)
    keys[15], values[15] = 2.0, 3.0  # the last slot of the spare block
    assert cache.tensor[0, 1, 7, 1].tolist() == [[2.0] * 4]
    assert cache.tensor[1, 1, 7, 1].tolist() == [[3.0] * 4]
