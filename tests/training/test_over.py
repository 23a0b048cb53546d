"""A soft prompt over an adapter: the adapter of the server, and the model that the soft prompt is trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from prompt_store.types import PromptRef
from server.client.http import ClientError, PreludeClient
from server.training.encoding import Encoded
from server.training.errors import RunDirectoryError, SettingsError, TrainingError
from server.training.over import Over, add_over, find_over
from server.training.peft_methods import load_adapter, make_peft_model, remove_adapter, save_adapter
from server.training.run_directory import RunDirectory
from server.training.scoring import text_logprobs
from server.training.settings import Method
from tests.training.conftest import Heard, MakeSettings, Trained
from tests.training.test_lora import randomised

TOKENS = [31, 32, 33, 34, 35]
KINDS: dict[str, Any] = {
    "attention": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.9),
    "embeddings and head": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "dora": LoraConfig(r=4, target_modules=["o_proj", "up_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def saved(base: Any, config: Any, folder: Path) -> Path:
    """A random adapter in PEFT's files; the base stays unchanged."""
    model: Any = randomised(get_peft_model(base, config))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    remove_adapter(model)
    return folder


def example(method: Method) -> Encoded:
    return Encoded(TOKENS, [36, 0], 1 if method is Method.MULTITASK else None)


@pytest.mark.parametrize("method", [method for method in Method if method.is_soft_prompt])
@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_over_an_adapter_equals_one_over_the_merged_weights(
    base: Any, tokenizer: Any, settings: MakeSettings, tiny: Path, tmp_path: Path, kind: str, method: Method
) -> None:
    folder = saved(base, KINDS[kind], tmp_path / "over")
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()  # the head is not tied
    assert text_logprobs(add_over(base, folder), example(Method.P_TUNING)) == pytest.approx(
        text_logprobs(merged, example(Method.P_TUNING)), abs=1e-4
    )
    torch.manual_seed(1)
    model: Any = make_peft_model(
        base, tokenizer, settings(method=method), text="Route this", context=[example(method)], num_tasks=2
    )
    model.train()
    assert not any(weight.requires_grad for name, weight in base.named_parameters())
    save_adapter(model, tmp_path / "prompt", base_name="b", keeps_text=True)

    found = text_logprobs(load_adapter(base, tmp_path / "prompt"), example(method))

    reference = text_logprobs(PeftModel.from_pretrained(merged, str(tmp_path / "prompt")), example(method))
    assert found == pytest.approx(reference, abs=1e-4)
    without = text_logprobs(PeftModel.from_pretrained(plain_of(tiny), str(tmp_path / "prompt")), example(method))
    assert found != pytest.approx(without, abs=1e-2)


def plain_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_adapter_has_no_dropout_in_training(base: Any, tmp_path: Path) -> None:
    model = add_over(base, saved(base, KINDS["attention"], tmp_path / "over"))
    model.train()
    ids = torch.tensor([TOKENS])

    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_of_another_model_is_an_error(base: Any, tiny: Path, tmp_path: Path) -> None:
    folder = saved(base, KINDS["attention"], tmp_path / "over")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))

    with pytest.raises(TrainingError, match="PEFT cannot load the adapter"):
        add_over(base, folder)


class _Server:
    """The versions of a server, by reference."""

    def __init__(self, **records: Any) -> None:
        self._records = records

    def version(self, ref: PromptRef) -> Any:
        if ref.name not in self._records:
            raise ClientError("no such prompt", status=404, code="prompt_not_found")
        return {"id": ref.name, "version": 3, "digest": "d", "task_type": "CAUSAL_LM", **self._records[ref.name]}


def test_the_adapter_is_found_by_name_alias_and_version() -> None:
    server: Any = _Server(tone={"kind": "adapter"})

    for text in ("tone", "tone@canary", "tone@3"):
        over = find_over(server, text)
        assert (over.ref, over.digest) == ("tone@3", "d")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"kind": "soft_prompt"}, "tone@3 is a soft prompt"),
        ({}, "tone@3 is a soft prompt"),
        ({"kind": "adapter", "task_type": "SEQ_CLS"}, "tone@3 has the task type SEQ_CLS"),
    ],
)
def test_only_an_adapter_that_generates_can_be_below(record: dict[str, str], reason: str) -> None:
    server: Any = _Server(tone=record)

    with pytest.raises(SettingsError, match=reason):
        find_over(server, "tone")


# Whole trainings, with the server's answers replaced


@pytest.fixture
def served(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tone@2``, an adapter of a server; returns its files."""
    folder = saved(base, KINDS["attention"], tmp_path / "tone")

    def pull(client: PreludeClient, version: Any, directory: Path, **_: Any) -> None:
        shutil.copytree(folder, directory, dirs_exist_ok=True)

    monkeypatch.setattr("server.training.run.find_over", lambda client, text: Over("tone@2", {"digest": "abc"}))
    monkeypatch.setattr(PreludeClient, "pull", pull)
    return folder


@pytest.mark.slow
def test_a_run_over_an_adapter_records_it(
    settings: MakeSettings, trained: Trained, heard: Heard, served: Path, base: Any, tmp_path: Path
) -> None:
    plain = trained(settings(run_dir=tmp_path / "plain", method=Method.PREFIX_TUNING))
    made = settings(over="tone@2", method=Method.PREFIX_TUNING)
    result = trained(made)

    assert result["over"] == "tone@2"
    assert plain["over"] is None
    assert result["scores"].keys() == {"bare", "over", "untrained", "trained"}
    assert result["scores"]["bare"] == plain["scores"]["bare"]
    assert result["scores"]["over"] != result["scores"]["bare"]
    assert result["scores"]["trained"]["loss"] < result["scores"]["untrained"]["loss"]
    directory = RunDirectory(tmp_path / "run")
    assert directory.read("settings.json")["digests"]["over"] == "abc"
    assert (directory.over / "adapter_model.safetensors").read_bytes() == (
        served / "adapter_model.safetensors"
    ).read_bytes()
    assert trained(settings(over="tone@2", method=Method.PREFIX_TUNING, resume=True)) == result
    with pytest.raises(RunDirectoryError, match="other settings: over was 'abc' and is None"):
        trained(settings(method=Method.PREFIX_TUNING, resume=True))


@pytest.mark.slow
def test_a_run_that_fails_before_its_first_step_can_start_again(
    settings: MakeSettings, trained: Trained, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrainingError("no such layer")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="no such layer"):
        patch.setattr("server.training.run.add_over", fail)
        trained(settings(over="tone@2"))

    assert trained(settings(over="tone@2"))["steps"] == 4
