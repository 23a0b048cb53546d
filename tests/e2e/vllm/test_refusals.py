"""Settings and models that engine vllm refuses, in words, and a start that fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoModelForCausalLM, DeepseekV2Config

from prompt_store.errors import InvalidPromptError
from server.engine.types import ModelInfo
from server.errors import EngineStartError
from tests.support.engine.harness import SHAPE, Family, uploaded
from tests.support.serving import serving
from tests.support.vllm import PYTHON, make_vllm_family, needs_vllm
from tests.support.vllm_engine import Engine

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A model with latent attention."""
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    config = DeepseekV2Config(
        **shape,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    path = tmp_path_factory.mktemp("latent") / "model"
    model.save_pretrained(path)
    return Family("latent", path, model)


@pytest.fixture(scope="module")
def falcons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Models with fewer key/value heads than PEFT's prefixes for them, each with such a prefix."""
    names = ("falcon_multi_query", "falcon_grouped")
    return {name: make_vllm_family(name, tmp_path_factory.mktemp(name), ("prefix_13",)) for name in names}


@pytest.fixture(scope="module")
def outcomes(latent: Family, falcons: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``tests/support/vllm_refusals.py`` prints."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in {"llama": make_vllm_family("llama", folder, ()), **falcons}.items():
        (folder / name).symlink_to(family.path)
    (folder / "latent").symlink_to(latent.path)
    command = [PYTHON, "-m", "tests.support.vllm_refusals", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batched_tokens", ("vLLM refuses the settings (", "max_num_batched_tokens")),
        ("own_argument", ("--engine-args may not set kv_transfer_config",)),
        ("no_json", ("--engine-args is not JSON",)),
        ("no_object", ("--engine-args is not a JSON object",)),
        ("pipeline_parallel", ("--pipeline-parallel-size: vLLM's CPU build",)),
        ("device", ("--device cuda: the vLLM of --engine-python is built for cpu",)),
    ],
)
def test_settings_are_refused_in_words(outcomes: dict[str, Any], name: str, words: tuple[str, ...]) -> None:
    assert all(word in outcomes[name] for word in words), outcomes[name]


def test_latent_attention_has_no_soft_prompts_of_keys_and_values(outcomes: dict[str, Any]) -> None:
    """The words of the refusal are tested with the capabilities: ``tests/engine/process/test_capabilities.py``."""
    assert "key_values" in outcomes["model_of_llama"]["capabilities"]
    assert "key_values" not in outcomes["model_of_latent"]["capabilities"]


@pytest.mark.parametrize(("name", "num_heads"), [("falcon_multi_query", 1), ("falcon_grouped", 2)])
def test_prefixes_for_more_heads_than_the_cache_has_are_refused_at_upload(
    outcomes: dict[str, Any], falcons: dict[str, Family], name: str, num_heads: int
) -> None:
    model = msgspec.convert(outcomes[f"model_of_{name}"], ModelInfo)
    with pytest.raises(InvalidPromptError) as caught:
        uploaded(falcons[name].peft_folders["prefix_13"], model)
    (fault,) = caught.value.faults
    assert fault.code == "shape_mismatch"
    assert "trained for other key/value heads" in fault.message
    assert f"3 layers x 2 x {num_heads} key/value heads x head_dim 32" in fault.message


def test_latent_attention_is_refused_at_start_where_vllm_ignores_what_is_loaded(latent: Family) -> None:
    """So it is on CPUs without AMX; for those with it, vLLM has other code, which needs bfloat16."""
    plain = json.dumps({"attention_backend": "CPU_MLA"})
    with pytest.raises(EngineStartError, match="vLLM does not use loaded keys and values of DeepseekV2ForCausalLM"):
        Engine(latent, 2**20, kv_cache_memory=64 * 2**20, engine_args=plain)


def test_a_server_says_why_it_does_not_start(tmp_path: Path) -> None:
    flags = ("--engine", "vllm", "--engine-python", PYTHON, "--engine-args", '{"kv_transfer_config": {}}')
    with (
        pytest.raises(RuntimeError, match="prelude: --engine-args may not set kv_transfer_config"),
        serving(tmp_path, *flags),
    ):
        pass
