"""Adapters as vLLM loads them: ranks and scales by PEFT's rules, no pattern of the uploader, faults in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE, AdaptedModule, ModuleShape
from server.engine.types import AdapterSource
from server.engine.vllm.adapters.files import (
    AdapterRefusedError,
    AdapterUnreadableError,
    config_of,
    write_folder,
)

Q, K, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm_head"
MODULES = {
    Q: ModuleShape("linear", 8, 6),
    K: ModuleShape("linear", 8, 4),
    HEAD: ModuleShape("linear", 8, 9, "engine vllm does not adapt it"),
}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6}


def factors(module: str, rank: int = 2, *, num_in: int = 8, num_out: int = 6) -> dict[str, np.ndarray]:
    return {
        f"base_model.model.{module}.lora_A.weight": np.ones((rank, num_in), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.ones((num_out, rank), np.float32),
    }


def write(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> AdapterSource:
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    save_file(tensors, folder / "weights.safetensors")
    return AdapterSource(
        digest="d" * 64,
        path=str(folder / "weights.safetensors"),
        config_path=str(folder / "config.json"),
        num_parameters=1,
    )


def loadable(source: AdapterSource, folder: Path, max_rank: int = 8) -> dict[str, Any]:
    write_folder(source, folder / "out", modules=MODULES, max_rank=max_rank)
    fields: dict[str, Any] = json.loads((folder / "out" / CONFIG_FILE).read_text())
    return fields


def test_the_weights_are_linked_and_patterns_are_resolved(tmp_path: Path) -> None:
    tensors = factors(Q) | factors(K, 4, num_out=4)
    source = write(tmp_path, tensors, rank_pattern={"k_proj": 4}, alpha_pattern={r".*\.k_proj": 2}, use_rslora=True)
    fields = loadable(source, tmp_path)
    assert (tmp_path / "out" / WEIGHTS_FILE).resolve() == Path(source.path).resolve()
    assert "use_rslora" not in fields

    def rank_and_scale(module: str) -> tuple[int, float]:
        found = [key for key in fields["rank_pattern"] if re.fullmatch(rf"(.*\.)?({key})", module)]
        rank = fields["rank_pattern"][found[0]] if found else fields["r"]
        return rank, (fields["alpha_pattern"][found[0]] if found else fields["lora_alpha"]) / rank

    assert rank_and_scale(Q) == pytest.approx((2, 6 / 2**0.5))
    assert rank_and_scale(K) == pytest.approx((4, 2 / 4**0.5))


def test_a_name_matches_itself_alone() -> None:
    others = [AdaptedModule("axb", 2, 1.0, {}), AdaptedModule("c", 2, 1.0, {})]
    patterns = config_of([AdaptedModule("a.b", 5, 1.0, {}), *others])["rank_pattern"]
    assert isinstance(patterns, dict)
    assert [re.fullmatch(pattern, name) is not None for pattern in patterns for name in ("a.b", "axb")] == [
        True,
        False,
    ]


def test_copies_of_the_base_are_left_out(tmp_path: Path) -> None:
    copy = {"base_model.model.lm_head.base_layer.weight": np.ones((9, 8), np.float32)}
    loadable(write(tmp_path, factors(Q) | copy), tmp_path)
    assert load_file(tmp_path / "out" / WEIGHTS_FILE).keys() == factors(Q).keys()


BIAS = {f"base_model.model.{Q}.lora_B.bias": np.ones(6, np.float32)}
MAGNITUDE = {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(6, np.float32)}
IA3 = {f"base_model.model.{Q}.ia3_l": np.ones((6, 1), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "fields", "words"),
    [
        (factors(Q) | BIAS, {"lora_bias": True}, "lora_A and lora_B alone"),
        (factors(Q) | MAGNITUDE, {"use_dora": True}, "lora_A and lora_B alone"),
        (IA3, {"peft_type": "IA3"}, "lora_A and lora_B alone"),
        (factors(HEAD, num_out=9), {}, "engine vllm does not adapt it"),
        (factors("model.layers.7.q_proj"), {}, "no module of this base"),
        (factors(Q, 9), {"r": 9}, "the limit of this server is 8"),
        (factors(Q, num_in=7), {}, "7 to 6 features"),
        (factors(Q), {"r": 3}, "configuration says 3"),
        (factors(Q), {"init_lora_weights": "pissa"}, "the base was changed"),
        (factors(Q), {"alora_invocation_tokens": [1]}, "aLoRA"),
    ],
)
def test_what_vllm_does_not_apply_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterRefusedError, match=re.escape(words)):
        loadable(write(tmp_path, tensors, **fields), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["no weights", "no config", "cut", "no JSON"])
def test_damaged_files_are_unreadable(tmp_path: Path, damage: str) -> None:
    source = write(tmp_path, factors(Q))
    if damage == "no weights":
        Path(source.path).unlink()
    elif damage == "no config":
        Path(source.config_path).unlink()
    elif damage == "cut":
        Path(source.path).write_bytes(Path(source.path).read_bytes()[:-8])
    else:
        Path(source.config_path).write_text("{")
    with pytest.raises(AdapterUnreadableError, match="cannot be read"):
        loadable(source, tmp_path)
