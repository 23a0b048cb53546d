"""Fixtures: a tiny model with the demo's tokenizer, files of examples, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner, Result

from server.cli import app
from server.demo.tour import MODEL_DIRECTORY
from server.training.encoding import Encoder
from server.training.run import Reporter, train
from server.training.settings import TrainSettings

CONTEXT = 96
WORDS = ["call", "great", "support", "delivery"]

MakeSettings = Callable[..., TrainSettings]
Prelude = Callable[..., Result]
Trained = Callable[[TrainSettings], dict[str, Any]]


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Save a random Llama of two layers with the demo's tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1585,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_DIRECTORY / name, folder / name)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Texts whose label is their first word."""
    return [
        {"text": f"{WORDS[place % 4]} number {place} please", "label": WORDS[place % 4], **more}
        for place in range(count)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def base(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, (0,), "\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", rows(24))


@pytest.fixture
def settings(tiny: Path, data: Path, tmp_path: Path) -> MakeSettings:
    """Settings for a training of a few steps."""

    def make(**changes: Any) -> TrainSettings:
        defaults: dict[str, Any] = {
            "model": str(tiny),
            "data": data,
            "name": "words",
            "run_dir": tmp_path / "run",
            "num_virtual_tokens": 4,
            "max_steps": 4,
            "batch_size": 8,
            "eval_steps": 2,
            "device": "cpu",
        }
        return TrainSettings(**(defaults | changes))

    return make


@pytest.fixture
def curves() -> None:
    """Requested by tests that read the picture of the curves."""


@pytest.fixture(autouse=True)
def _drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing unless a test requests ``curves``: it takes as long as the training."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("server.training.run.draw_curves", lambda *_, **__: True)


class Heard(list[str]):
    """The messages and warnings of a training."""

    @property
    def reporter(self) -> Reporter:
        return Reporter(self.append, lambda text: self.append(f"warning: {text}"), lambda at: None)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def trained(heard: Heard) -> Trained:
    return lambda settings: train(settings, heard.reporter)


@pytest.fixture
def prelude_train(tiny: Path, data: Path, tmp_path: Path) -> Prelude:
    """``prelude train`` with arguments for a short training before those given."""

    def invoke(*arguments: str, model: str | None = None) -> Result:
        own = ["train", "--model", model or str(tiny), "--data", str(data), "--id", "words", "--device", "cpu"]
        own += ["--run-dir", str(tmp_path / "run"), "--num-virtual-tokens", "4", "--max-steps", "4"]
        own += ["--batch-size", "8", "--eval-steps", "2"]
        return CliRunner().invoke(app, [*own, *arguments])

    return invoke
