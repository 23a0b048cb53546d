"""Each format becomes a PEFT directory that PEFT itself loads, with the logits of the other program."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE
from server.cli import app as cli
from server.client.importers.base_config import read_base_config
from server.client.importers.conversion import convert
from server.client.importers.formats import read_foreign
from server.client.importers.kinds import Format, ImportFileError

NUM_TOKENS = 5
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
TEXT = torch.tensor([[5, 9, 33, 7, 60, 2]])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return model


@pytest.fixture(scope="module")
def glm() -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = GlmForCausalLM(GlmConfig(**SHAPE)).eval()
    return model


def by_peft(model: PreTrainedModel, directory: Path) -> torch.Tensor:
    """The logits of PEFT behind a converted prompt."""
    peft_model = PeftModel.from_pretrained(model, str(directory))
    with torch.inference_mode():
        logits: torch.Tensor = peft_model(input_ids=TEXT).logits
    return logits[:, -TEXT.shape[1] :]


def behind_rows(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    embeds = torch.cat([rows[None], model.get_input_embeddings()(TEXT)], 1)
    with torch.inference_mode():
        logits: torch.Tensor = model(inputs_embeds=embeds).logits
    return logits[:, len(rows) :]


def behind_cache(
    model: PreTrainedModel, keys: list[torch.Tensor], values: list[torch.Tensor], first_position: int
) -> torch.Tensor:
    """The logits behind keys and values [1, heads, tokens, head_dim] of each layer."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    positions = torch.arange(first_position, first_position + TEXT.shape[1])[None]
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=TEXT, past_key_values=cache, position_ids=positions).logits
    return logits


def make_layers(num_tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, 2, num_tokens, 8) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tgis(tmp_path: Path, llama: PreTrainedModel, dtype: torch.dtype) -> None:
    rows = torch.randn(NUM_TOKENS, 32).to(dtype)
    (tmp_path / "prompt").mkdir()
    torch.save(rows, tmp_path / "prompt/decoder.pt")
    imported = convert(tmp_path / "prompt", tmp_path / "out", base="some/base")
    assert imported.format is Format.TGIS
    stored = load_file(tmp_path / "out" / WEIGHTS_FILE)["prompt_embeddings"]
    assert torch.equal(stored, rows)
    assert stored.dtype is dtype, "no wider than needed"
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["base_model_name_or_path"] == "some/base"
    torch.testing.assert_close(by_peft(llama, tmp_path / "out"), behind_rows(llama, rows.float()))


def test_a_prompt_of_an_encoder_is_refused(tmp_path: Path) -> None:
    for name in ("decoder.pt", "encoder.pt"):
        torch.save(torch.randn(2, 4), tmp_path / name)
    with pytest.raises(ImportFileError, match="encoder-decoder"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("num_frozen", [0, 1])
@pytest.mark.parametrize("as_safetensors", [False, True])
def test_cartridges(tmp_path: Path, llama: PreTrainedModel, num_frozen: int, as_safetensors: bool) -> None:
    keys, values = make_layers(NUM_TOKENS), make_layers(NUM_TOKENS)
    parts = {
        f"{part}_{name}": [layer[:, :, cut].contiguous() for layer in layers]
        for part, cut in (("fixed", slice(num_frozen)), ("trainable", slice(num_frozen, None)))
        for name, layers in (("keys", keys), ("values", values))
        if part == "trainable" or num_frozen
    }
    if as_safetensors:
        path = tmp_path / "cartridge.safetensors"
        save_file({f"{name}.{i}": layer for name, layers in parts.items() for i, layer in enumerate(layers)}, path)
    else:
        path = tmp_path / "cache_last.pt"
        lists = {name: torch.nn.ParameterList(map(torch.nn.Parameter, layers)) for name, layers in parts.items()}
        torch.save({"fixed_keys": [], "fixed_values": []} | lists, path)
    imported = convert(path, tmp_path / "out")
    assert imported.format is Format.CARTRIDGE
    assert imported.config["num_frozen_tokens"] == num_frozen
    expected = behind_cache(llama, keys, values, NUM_TOKENS)
    torch.testing.assert_close(by_peft(llama, tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "glm"])
@pytest.mark.parametrize("is_projected", [False, True])
def test_chatglm(tmp_path: Path, request: pytest.FixtureRequest, family: str, is_projected: bool) -> None:
    model: PreTrainedModel = request.getfixturevalue(family)
    rows = torch.randn(NUM_TOKENS, 96)
    weights = {"embedding.weight": rows}
    if is_projected:
        encoder = torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.Tanh(), torch.nn.Linear(20, 96))
        small = torch.randn(NUM_TOKENS, 16)
        rows = encoder(small).detach()
        weights = {"embedding.weight": small} | {
            f"trans.{name}": tensor for name, tensor in encoder.state_dict().items()
        }
    torch.save(
        {f"transformer.prefix_encoder.{name}": tensor for name, tensor in weights.items()},
        tmp_path / "pytorch_model.bin",
    )
    model.config.save_pretrained(tmp_path / "base")
    imported = convert(tmp_path, tmp_path / "out", base_config=tmp_path / "base")
    assert imported.format is Format.CHATGLM
    # ChatGLM views a row as [layers * 2, heads, head_dim], and lets the text begin at position 0.
    split = rows.view(1, NUM_TOKENS, 6, 2, 8).permute(2, 0, 3, 1, 4)
    expected = behind_cache(model, [*split[0::2]], [*split[1::2]], 0)
    torch.testing.assert_close(by_peft(model, tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(behind_cache(model, [*split[0::2]], [*split[1::2]], NUM_TOKENS), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_koboldai(tmp_path: Path, llama: PreTrainedModel, dtype: str) -> None:
    rows = torch.randn(NUM_TOKENS, 32).to(getattr(torch, dtype))
    array = rows.view(torch.uint16).numpy().view("V2") if dtype == "bfloat16" else rows.numpy()
    path = tmp_path / "prompt.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("tensor.npy", "w") as file:
            np.save(file, array, allow_pickle=False)
        archive.writestr(
            "meta.json", json.dumps({"name": "A style", "author": "x\x1b[2J", "supported": "llama", "n": 3})
        )
    imported = convert(path, tmp_path / "out")
    assert imported.format is Format.KOBOLDAI
    assert imported.notes == ["name: A style", "author: x\\x1b[2J", "supported: llama"]
    torch.testing.assert_close(by_peft(llama, tmp_path / "out"), behind_rows(llama, rows.float()))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_pickles_of_peft(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    config_class = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    trained = get_peft_model(model, config_class(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    trained.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
    trained.save_pretrained(str(tmp_path / "safe"))
    assert convert(tmp_path / "pickled", tmp_path / "out").format is Format.PEFT_PICKLE
    converted, expected = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("out", "safe"))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name].float(), expected[name].float()) for name in expected)
    configs = [json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("out", "pickled")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(0, 3), "shape"),
        (torch.full((2, 3), torch.nan), "NaN"),
        ([torch.zeros(2, 2)], "neither a tensor nor"),
        ({"lora_A": torch.zeros(2, 2)}, "no known format"),
        (
            {"transformer.prefix_encoder.embedding.weight": torch.zeros(2, 96), "lm_head.weight": torch.zeros(1)},
            "lost",
        ),
        ({"prefix_encoder.trans.0.weight": torch.zeros(2, 96)}, "not complete"),
        ({"prefix_encoder.embedding.weight": torch.zeros(2, 96)}, "--base-config"),
        ({"trainable_keys": [], "trainable_values": [], "fixed_keys": [], "fixed_values": []}, "no layers"),
        ({"trainable_keys": [torch.zeros(1, 2, 3, 4)], "fixed_keys": [], "fixed_values": []}, "trainable_values"),
        (
            {
                "trainable_keys": [torch.zeros(1, 2, 3, 4)],
                "trainable_values": [torch.zeros(1, 2, 3, 5)],
                "fixed_keys": [],
                "fixed_values": [],
            },
            "differ in shape",
        ),
        (
            {
                "trainable_keys": [torch.zeros(1, 2, 3, 4)],
                "trainable_values": [torch.zeros(1, 2, 3, 4)],
                "fixed_keys": [torch.zeros(1, 3, 3, 4)],
                "fixed_values": [torch.zeros(1, 3, 3, 4)],
            },
            "do not fit together",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(ImportFileError, match=words):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_is_not_overwritten(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3), tmp_path / "decoder.pt")
    convert(tmp_path / "decoder.pt", tmp_path / "out")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "decoder.pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "not the configuration"),
        ("{", "not valid JSON"),
        ("{}", "missing or not valid"),
        ('{"model_type": "chatglm", "num_layers": 2}', "first ChatGLM"),
        ('{"num_attention_heads": 2, "rope_scaling": {"rope_type": "yarn"}}', "yarn"),
    ],
)
def test_a_base_that_is_not_understood_is_refused(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ImportFileError, match=words):
        read_base_config(tmp_path)


def test_the_configuration_of_chatglm2_is_understood(tmp_path: Path) -> None:
    fields = {
        "model_type": "chatglm", "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128,
        "multi_query_attention": True, "multi_query_group_num": 2, "rope_ratio": 50,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = read_base_config(tmp_path)
    assert (base.width, base.rotary_dim, base.rope_theta, base.is_interleaved) == (
        28 * 2 * 2 * 128,
        64,
        500_000,
        True,
    )


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "name", ["decoder.pt", "pytorch_model.bin", "adapter_model.bin", "cartridge.pt", "prompt.zip"]
)
def test_hostile_files_run_nothing(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "touched"
    source = tmp_path / "source"
    source.mkdir()
    (source / CONFIG_FILE).write_text("{}")
    if name == "prompt.zip":
        with zipfile.ZipFile(source / name, "w") as archive, archive.open("tensor.npy", "w") as file:
            np.save(file, np.array([[Evil(victim)]], dtype=object), allow_pickle=True)
    else:
        torch.save({"embedding.weight": Evil(victim)}, source / name)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(source / name)
    with pytest.raises(ImportFileError):
        convert(source, tmp_path / "out")
    assert not victim.exists()
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_read_and_what_to_do_next(tmp_path: Path) -> None:
    torch.save(torch.ones(NUM_TOKENS, 32), tmp_path / "decoder.pt")
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "decoder.pt"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "tgis" in result.output
    assert f"prelude push {out} --id NAME" in result.output.replace("\n", " ")
    again = CliRunner().invoke(cli, ["import", str(tmp_path / "decoder.pt"), "--out", str(out)])
    assert again.exit_code == 1
    assert "exists already" in again.output.replace("\n", " ")


def test_the_importers_import_no_torch() -> None:
    code = "import sys, server.client.importers.conversion; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
