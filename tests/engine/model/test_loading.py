"""Quantised checkpoints are loaded onto the device, by a stand-in for the library that quantises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from server.config import EngineSettings
from server.engine.model.loading import load_model
from server.engine.model.platform import Platform
from server.errors import EngineStartError
from tests.support.engine.harness import SHAPE

HOST = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "bitsandbytes": BitsAndBytesConfig(load_in_8bit=True).to_dict(),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True).to_dict(),
    "an old checkpoint": {"load_in_8bit": True},
    "another library": {"quant_method": "fp8"},
    "none": {},
}


class Checkpoint:
    """A model of a folder, and how transformers was called for it."""

    def __init__(self, folder: Path, described: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        config = LlamaConfig(**SHAPE)
        config.save_pretrained(folder)
        self.settings = EngineSettings(model=str(folder))
        self.moves: list[tuple[object, ...]] = []
        self.device_map: object = "not called"
        if described:
            written = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(written | {"quantization_config": described}))
        self.model = AutoModelForCausalLM.from_config(config)
        patch.setattr(self.model, "to", self._move)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", self._load)

    def _load(self, _name: str, *, device_map: object, **_: object) -> tuple[Any, dict[str, set[str]]]:
        self.device_map = device_map
        return self.model, {"missing_keys": set()}

    def _move(self, *arguments: object) -> Any:
        self.moves.append(arguments)
        return self.model


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Checkpoint]:
    return lambda name: Checkpoint(tmp_path, CONFIGS[name], monkeypatch)


@pytest.mark.parametrize("name", ["bitsandbytes", "4 bits", "an old checkpoint"])
def test_models_of_bitsandbytes_are_loaded_onto_the_device_and_never_moved(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    made = checkpoint(name)
    model, config = load_model(made.settings, Platform(HOST))
    assert (made.device_map, made.moves) == (HOST, [])
    assert model is made.model
    assert config.vocab_size == SHAPE["vocab_size"]
    module: torch.nn.Module = made.model
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("name", ["another library", "none"])
def test_other_models_are_moved(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    made = checkpoint(name)
    load_model(made.settings, Platform(HOST))
    assert (made.device_map, made.moves) == (None, [(HOST,)])


def test_a_description_as_an_object_is_read(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint("none")
    config = AutoConfig.from_pretrained(made.settings.model)
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    load_model(made.settings, Platform(HOST))
    assert (made.device_map, made.moves) == (HOST, [])


def test_without_its_library_the_reason_is_reported(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = CONFIGS["bitsandbytes"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(EngineStartError, match="(?i)cannot load the model .*bitsandbytes"):
        load_model(EngineSettings(model=str(tmp_path)), Platform(HOST))
