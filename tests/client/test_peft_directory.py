"""How ``prelude push`` explains directories that PEFT did not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.client import peft_directory
from server.client.peft_directory import explain_directory


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def test_a_pickle_gets_conversion_advice(tmp_path: Path) -> None:
    text = explain_directory(make(tmp_path / "p", "adapter_config.json", "adapter_model.bin"))
    assert "a pickle" in text
    assert f"prelude import {tmp_path / 'p'} --out NEW" in text


def test_the_parent_of_an_adapter_names_the_folder(tmp_path: Path) -> None:
    inner = make(tmp_path / "run" / "my-adapter", *ADAPTER)
    assert explain_directory(tmp_path / "run").endswith(f"push its folder {inner}")


def test_checkpoints_are_named_newest_first_and_some_of_them(tmp_path: Path) -> None:
    for step in (900, 1000, 100, 20, 3000, 400, 5):
        make(tmp_path / f"checkpoint-{step}", *ADAPTER)
    text = explain_directory(tmp_path)
    assert [Path(part).name.split()[0] for part in text.split(": ", 1)[1].split(", ")] == [
        f"checkpoint-{step}" for step in (3000, 1000, 900, 400, 100)
    ]
    assert text.endswith(" and 2 more")


def test_folders_of_several_adapters_are_named(tmp_path: Path) -> None:
    for name in ("default", "other", "checkpoint-" + "9" * 30):
        make(tmp_path / name, "adapter_model.bin")
    text = explain_directory(tmp_path)
    assert "push one of its folders" in text
    assert text.count("/") >= 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("config.json", "model.safetensors"), "a whole model, perhaps with a merged adapter"),
        (("model-00001-of-00002.safetensors",), "a whole model"),
        (("pytorch_model.bin",), "a whole model"),
        (("llama.gguf",), "a whole model"),
        (("weights.zip",), "unpack weights.zip first"),
        (("adapter.TAR.GZ",), "unpack adapter.TAR.GZ first"),
        (("README.md",), "give the directory that PEFT's save_pretrained() wrote"),
        ((), "has no adapter_config.json and no adapter_model.safetensors"),
        (("adapter_model.safetensors",), "has no adapter_config.json: give"),
        (("adapter_config.json",), "has no adapter_model.safetensors: it contains only the configuration"),
        (("adapter_config.json", "w.zip"), "it contains only the configuration; unpack w.zip first"),
    ],
)
def test_other_directories_are_explained(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    text = explain_directory(make(tmp_path / "d", *names))
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("config", "kind"), [('{"peft_type": "LORA"}', "(peft_type LORA)"), ("[", "only the"), ("[1]", "only the")]
)
def test_a_configuration_without_weights_is_named_by_its_kind(tmp_path: Path, config: str, kind: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    assert kind in explain_directory(tmp_path)


def test_reading_a_huge_directory_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_directory, "_MAX_FOLDERS", 3)
    for index in range(10):
        make(tmp_path / f"f{index}", *ADAPTER)
    assert explain_directory(tmp_path).count("/f") <= 3


@pytest.mark.parametrize("as_json", [False, True])
def test_push_prints_the_explanation_in_one_line(tmp_path: Path, as_json: bool) -> None:
    make(tmp_path / "run" / "checkpoint-10", *ADAPTER)
    line = ["push", str(tmp_path / "run"), "--id", "x", "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, [*line, "--json"] if as_json else line)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "checkpoint-10" in result.stderr
    if as_json:
        assert json.loads(result.stdout)["error"]["code"] == "local"


@pytest.mark.parametrize(
    ("name", "words"), [("a.zip", "is an archive"), ("adapter_model.safetensors", "is a file: give the directory")]
)
def test_push_of_a_file_is_a_usage_error(tmp_path: Path, name: str, words: str) -> None:
    make(tmp_path, name)
    result = CliRunner().invoke(app, ["push", str(tmp_path / name), "--id", "x"], env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_directory_deleted_during_the_check_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.client.http.explain_directory", lambda path: list(Path(path / "gone").iterdir()))
    result = CliRunner().invoke(app, ["push", str(tmp_path), "--id", "x"])
    assert result.exit_code == 1
    assert "gone: No such file" in result.stderr
