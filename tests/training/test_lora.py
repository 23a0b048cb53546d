"""Adapters: their configuration, their files, and the measured size of their changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from server.training.errors import SettingsError
from server.training.lora import adapter_state, make_adapter, mean_change, restore_adapter
from server.training.peft_methods import save_adapter
from tests.training.conftest import MakeSettings

CONFIG = "adapter_config.json"


def randomised(model: Any, seed: int = 0) -> Any:
    """The same adapter with random weights: an untrained one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize(
    ("changes", "alpha", "scale"),
    [
        ({}, 32, 2.0),
        ({"rank": 4}, 8, 2.0),
        ({"rank": 4, "use_rslora": True}, 4, 2.0),
        ({"rank": 8, "lora_alpha": 4.0}, 4, 0.5),
        ({"rank": 16, "lora_alpha": 4.0, "use_rslora": True}, 4, 1.0),
    ],
)
def test_the_scale_is_2_unless_alpha_is_given(
    settings: MakeSettings, base: Any, changes: dict[str, Any], alpha: int, scale: float
) -> None:
    model: Any = make_adapter(base, settings(method="lora", **changes))

    assert model.peft_config["default"].lora_alpha == alpha
    assert base.model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(scale)


def test_all_linear_adapts_every_linear_layer_but_the_head(settings: MakeSettings, base: Any) -> None:
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    model = make_adapter(base, settings(method="lora"))
    adapted = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in adapter_state(model)}

    assert {name for name in adapted if ".lora_B" not in name} == linear - {"lm_head"}


def test_files_have_the_named_modules_and_no_base_layer(settings: MakeSettings, base: Any, tmp_path: Path) -> None:
    made = settings(method="lora", target_modules="q_proj, embed_tokens,lm_head", lora_dropout=0.5, rank=4)
    model = randomised(make_adapter(base, made))
    save_adapter(model, tmp_path, base_name="b", keeps_text=False)

    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["embed_tokens", "lm_head", "q_proj"]
    assert (config["r"], config["lora_dropout"], config["base_model_name_or_path"]) == (4, 0.5, "b")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sorted({name.rpartition("lora_")[0] for name in names}) == [
        "base_model.model.lm_head.",
        "base_model.model.model.embed_tokens.",
        "base_model.model.model.layers.0.self_attn.q_proj.",
        "base_model.model.model.layers.1.self_attn.q_proj.",
    ]


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("q_proj,w_pack", r"the model has no module 'w_pack'; it has .*down_proj.*all-linear selects"),
        ("proj", "the model has no module 'proj'"),
        ("input_layernorm", "PEFT rejects 'input_layernorm': "),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(
    settings: MakeSettings, base: Any, targets: str, reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        make_adapter(base, settings(method="lora", target_modules=targets))


def test_the_change_is_that_of_the_whole_matrices(settings: MakeSettings, base: Any) -> None:
    model = make_adapter(base, settings(method="lora", target_modules="v_proj,embed_tokens", rank=3, lora_alpha=5.0))
    assert mean_change(model) == 0.0
    randomised(model)
    shares = []
    for module in (
        base.model.embed_tokens,
        base.model.layers[0].self_attn.v_proj,
        base.model.layers[1].self_attn.v_proj,
    ):
        change = module.get_delta_weight("default")
        shares.append(float((change.norm() / module.base_layer.weight.norm()).detach()))

    assert mean_change(model) == pytest.approx(sum(shares) / 3, rel=1e-5)


def test_a_state_of_another_adapter_is_refused(settings: MakeSettings, base: Any) -> None:
    model = make_adapter(base, settings(method="lora", target_modules="q_proj"))
    state = adapter_state(model)
    state.pop(min(state))

    with pytest.raises(KeyError, match="other parameters"):
        restore_adapter(model, state)
