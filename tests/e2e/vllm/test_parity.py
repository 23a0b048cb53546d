"""Greedy tokens of vLLM equal PEFT's: every type in one batch, chunked, preempted, cached, and for two tenants."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine.harness import ALL_PEFT_CONFIGS
from tests.support.processes import metric
from tests.support.vllm import answers, make_vllm_family, needs_vllm, questions, serving_vllm, upload_all

pytestmark = [needs_vllm, pytest.mark.anyio, pytest.mark.timeout(600)]

MAX_TOKENS = 16
KEYS = "\n".join(
    f'[[keys]]\nkey = "{key}"\ntenant = "{key}"\nscopes = ["generate", "prompts:write", "admin"]\n' for key in "ab"
)
CHUNKS_OF_16 = ("--max-num-seqs", "16", "--max-num-batched-tokens", "16")
MEMORY = {"gpt2": "1200KiB"}
"""Key/value memory of 12 blocks of 32 tokens, for 32 sequences of up to 4 blocks each."""


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
async def test_all_types_equal_peft_in_one_batch(name: str, tmp_path: Path) -> None:
    family = make_vllm_family(name, tmp_path)
    (tmp_path / "keys.toml").write_text(KEYS)
    flags = ["--max-num-seqs", "32", "--max-num-batched-tokens", "64", "--max-model-len", "160"]
    flags += ["--kv-cache-memory", MEMORY.get(name, "600KiB"), "--api-key-file", str(tmp_path / "keys.toml")]
    asked = questions(family, 42)
    expected = [family.expected(key, text, MAX_TOKENS) for key, text in asked]
    with serving_vllm(tmp_path / "server", *flags, model=family.path) as (client, _):
        client.headers["authorization"] = "Bearer a"
        upload_all(client, family)
        # The second time, texts and soft prompts are in the prefix cache; another tenant finds nothing there.
        for tenant in ("a", "a", "b"):
            found = await answers(client.base_url, asked, MAX_TOKENS, {"authorization": f"Bearer {tenant}"})
            assert found == expected, tenant
        exposition = client.get("/metrics").text
        assert metric(exposition, "prelude_num_preemptions_total") > 0
        assert metric(exposition, "prelude_kv_cache_usage_ratio") == 0


@pytest.mark.parametrize(
    ("name", "keys", "flags"),
    [
        ("llama", tuple(ALL_PEFT_CONFIGS), CHUNKS_OF_16),
        ("llama", tuple(ALL_PEFT_CONFIGS), ("--tensor-parallel-size", "2")),
        ("gemma3", tuple(ALL_PEFT_CONFIGS), ("--tensor-parallel-size", "2", *CHUNKS_OF_16)),
        ("qwen3", tuple(ALL_PEFT_CONFIGS), ("--no-enable-prefix-caching",)),
        (
            "llama",
            tuple(ALL_PEFT_CONFIGS),
            (
                "--engine-args",
                '{"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}',
            ),
        ),
    ],
    ids=["chunks_of_16", "tensor_parallel", "tensor_parallel_windows", "no_prefix_cache", "ngram_speculation"],
)
async def test_other_ways_to_run_equal_peft(
    name: str, keys: tuple[str, ...], flags: tuple[str, ...], tmp_path: Path
) -> None:
    family = make_vllm_family(name, tmp_path, keys)
    asked = questions(family, 40, longest=200)
    expected = [family.expected(key, text, MAX_TOKENS) for key, text in asked]
    with serving_vllm(tmp_path / "server", *flags, "--max-model-len", "256", model=family.path) as (client, _):
        upload_all(client, family)
        for _ in range(2):
            assert await answers(client.base_url, asked, MAX_TOKENS) == expected
        hits = metric(client.get("/metrics").text, "prelude_prefix_cache_hits_total")
        assert (hits > 0) == ("--no-enable-prefix-caching" not in flags)
