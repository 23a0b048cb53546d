"""``prelude push --drop-base-layers`` sends an adapter without the copies of the base's tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from server.client.base_layers import BaseLayersError, without_base_layers
from tests.client.conftest import Data, Prelude

PREFIX = "base_model.model."
KEPT: dict[str, Any] = {
    f"{PREFIX}lm_head.lora_A.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
    f"{PREFIX}lm_head.lora_B.weight": np.arange(6, dtype=np.float16).reshape(3, 2),
    f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 3), np.float32),
}
COPIES: dict[str, Any] = {
    f"{PREFIX}lm_head.base_layer.weight": np.ones((3, 4), np.float32),
    f"{PREFIX}lm_head.base_layer.bias": np.ones(3, np.float32),
    f"{PREFIX}model.embed_tokens.weight": np.ones((3, 4), np.float16),
}


def write(folder: Path, tensors: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_copies_are_left_out_and_the_rest_is_the_same(tmp_path: Path) -> None:
    write(tmp_path, KEPT | COPIES)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with without_base_layers(tmp_path) as (folder, num_bytes):
        assert num_bytes == sum(tensor.nbytes for tensor in COPIES.values())
        assert (folder / "adapter_config.json").read_text() == '{"peft_type": "LORA"}'
        found = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == KEPT.keys()
        assert all(np.array_equal(found[name], tensor) for name, tensor in KEPT.items())
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}
    assert not folder.exists()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_file_without_copies_is_sent_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, KEPT)
    with without_base_layers(tmp_path) as (folder, num_bytes):
        assert (num_bytes, load_file(folder / "adapter_model.safetensors").keys()) == (0, KEPT.keys())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"PK\x03\x04" + b"\xff" * 100, "is not a safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ', "header"),
        ((4).to_bytes(8, "little") + b"[1] ", "header"),
        ((4).to_bytes(8, "little") + b"{]  ", "header"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    write(tmp_path, KEPT)
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(BaseLayersError, match=message), without_base_layers(tmp_path):
        pass


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, KEPT)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BaseLayersError, match="ends within the tensor"), without_base_layers(tmp_path):
        pass


def test_an_adapter_is_pushed_without_its_copies(data: Data, prelude: Prelude, tmp_path: Path) -> None:
    name = f"{PREFIX}model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{name}.lora_B.weight": np.ones((8, 2), np.float32),
        f"{PREFIX}lm_head.base_layer.weight": np.ones((258, 8), np.float32),
    }
    write(tmp_path, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    refused = prelude("push", str(tmp_path), "--id", "lora")
    assert refused.exit_code == 4
    assert "--drop-base-layers" in refused.stderr
    version = data("push", str(tmp_path), "--id", "lora", "--drop-base-layers")
    assert (version["id"], version["peft_type"], version["size"] < 1000) == ("lora", "LORA", True)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"pickle")
    broken = prelude("push", str(tmp_path), "--id", "lora", "--drop-base-layers")
    assert (broken.exit_code, "is not a safetensors file" in broken.stderr) == (2, True)
