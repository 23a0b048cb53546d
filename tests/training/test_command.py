"""``prelude train``: its output, its refusals and its exit status."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.client.commands import ExitStatus
from server.training import command
from server.training.command import seconds_left
from server.training.scoring import CompletionScores
from server.training.trainer import TrainingProgress
from tests.training.conftest import Prelude, rows, write_rows

TENSORBOARD_DIRECTORY = "TENSORBOARD_LOGGING_DIR"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that loads a tokenizer or a model."""
    for loaded in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loaded, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))


def test_progress_and_result_are_printed(prelude_train: Prelude, tmp_path: Path) -> None:
    result = prelude_train()

    assert result.exit_code == 0, result.output
    assert all(line.startswith("prelude: ") for line in result.stderr.splitlines())  # no output of libraries
    assert re.search(
        r"prelude: 4 steps over \d+ rows, \d+ held out, on cpu: about \d:\d\d:\d\d at most\n", result.stderr
    )
    assert "step 2 of 4: loss" in result.stderr
    assert "held out: loss" in result.stderr
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
    assert lines["name"][1] == "words"
    assert lines["files"][1] == str(tmp_path / "run" / "adapter")
    assert float(lines["trained"][2]) < float(lines["untrained"][2])


def test_with_json_standard_output_is_only_json(prelude_train: Prelude, tmp_path: Path) -> None:
    result = prelude_train("--json")

    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "result.json").read_text())


def test_bad_data_is_reported_by_line_before_a_model_loads(
    prelude_train: Prelude, data: Path, no_model: None
) -> None:
    data.write_text('{"text": "a", "label": "b"}\nnonsense\n{"text": "a"}\n')
    result = prelude_train()

    assert result.exit_code == ExitStatus.INVALID
    assert f"prelude: {data}:2: not JSON: Expecting value (character 1)\n" in result.stderr
    assert f"prelude: {data}:3: has no 'label'\n" in result.stderr
    assert result.stdout == ""


def test_bad_data_is_reported_as_json(prelude_train: Prelude, data: Path, no_model: None) -> None:
    data.write_text("nonsense")
    result = prelude_train("--json")

    assert result.exit_code == ExitStatus.INVALID
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "invalid_data"
    assert ":1: not JSON" in error["message"]


def test_held_out_data_of_another_form_is_refused(prelude_train: Prelude, tmp_path: Path, no_model: None) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    result = prelude_train("--eval-data", str(pairs))

    assert result.exit_code == ExitStatus.INVALID
    assert f"{pairs}:1: has the format {{prompt, completion}}, but" in result.stderr


def test_a_too_long_text_is_reported_by_line(
    prelude_train: Prelude, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    write_rows(data, [*rows(3), {"text": "long " * 200, "label": "call"}])
    result = prelude_train()

    assert result.exit_code == ExitStatus.INVALID
    assert f"{data}:4: " in result.stderr
    assert "at most 92 fit: the context has 96 tokens, 4 of them virtual" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--method", "ia3"], "'ia3' is not one of"),
        (["--method", "lora", "--rank", "0"], "--rank"),
        (["--method", "lora", "--lora-alpha", "0"], "it must be a finite number above 0"),
        (["--method", "lora", "--target-modules", " , "], "target_modules is empty"),
        (["--method", "lora", "--target-modules", "all-linear,q_proj"], "cannot be used with names of modules"),
        (["--method", "lora", "--target-modules", "q_proj,w_pack"], "the model has no module 'w_pack'; it has"),
        (["--method", "lora", "--over", "other@1"], "over cannot be used with lora"),
        (["--over", "Not A Name"], "over: "),
        (["--num-virtual-tokens", "0"], "--num-virtual-tokens"),
        (["--num-virtual-tokens", "96"], "the context has only 96 tokens"),
        (["--method", "cartridge", "--num-virtual-tokens", "1"], "nothing would be trained"),
        (["--method", "prefix_tuning", "--gradient-checkpointing"], "cannot be used with prefix_tuning"),
        (["--method", "p_tuning", "--init-text", "a"], "init_text cannot be used with p_tuning"),
        (["--id", "Not A Name"], "Not A Name"),
        (["--alias", "12"], "12"),
        (["--search", "3", "--eval-fraction", "0"], "search needs held-out rows"),
        (["--report-to", "paper"], "'paper' is not one of"),
        (["--task-type", "token-cls"], "'token-cls' is not one of"),
        (["--monitor", "f1"], "'f1' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--eval-fraction", "0.9"], "--eval-fraction"),
    ],
)
def test_usage_errors_are_explained(prelude_train: Prelude, arguments: list[str], reason: str) -> None:
    result = prelude_train(*arguments)

    assert result.exit_code == ExitStatus.USAGE
    assert reason in " ".join(result.stderr.replace("│", " ").split())


def test_a_used_run_directory_is_refused(prelude_train: Prelude, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    result = prelude_train()

    assert result.exit_code == ExitStatus.CONFLICT
    assert "is not empty" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"] == ["mine.txt"]


def test_a_missing_model_is_an_error(prelude_train: Prelude, tmp_path: Path) -> None:
    result = prelude_train(model=str(tmp_path / "none"))

    assert result.exit_code == ExitStatus.FAILED
    assert "does not exist: no such directory" in result.stderr
    assert "Traceback" not in result.output


def test_scores_are_reported_to_tensorboard(prelude_train: Prelude, tmp_path: Path) -> None:
    result = prelude_train("--report-to", "tensorboard")

    assert result.exit_code == 0, result.output
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (b"train/loss", b"train/learning_rate", b"eval/loss", b"eval/accuracy"):
        assert tag in content, tag
    assert TENSORBOARD_DIRECTORY not in os.environ


def test_tensorboards_own_directory_takes_precedence(
    prelude_train: Prelude, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TENSORBOARD_DIRECTORY, str(tmp_path / "elsewhere"))
    assert prelude_train("--report-to", "tensorboard").exit_code == 0
    assert list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_tracker_is_reported_with_the_install_command(
    prelude_train: Prelude, monkeypatch: pytest.MonkeyPatch, no_model: None
) -> None:
    own = find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "wandb" else own(name))
    result = prelude_train("--report-to", "wandb")

    assert result.exit_code == ExitStatus.USAGE
    assert "report_to: wandb is not installed: pip install wandb" in result.stderr


def test_a_missing_extra_is_reported_with_the_install_command(
    prelude_train: Prelude, monkeypatch: pytest.MonkeyPatch, no_model: None
) -> None:
    own = find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "peft" else own(name))
    result = prelude_train()

    assert result.exit_code == ExitStatus.USAGE
    assert "training needs peft: pip install 'prelude-server[train]'" in result.stderr


def test_an_interrupted_training_prints_how_to_resume(
    prelude_train: Prelude, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.training.run.make_peft_model", interrupt)
    result = prelude_train()

    assert result.exit_code == 130
    assert "run the same command with --resume to continue" in result.stderr


def test_without_matplotlib_a_message_says_that_there_are_no_curves(
    prelude_train: Prelude, curves: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.training.reporting.curves.find_spec", lambda name: None)
    result = prelude_train()

    assert result.exit_code == 0
    assert "no curves.png: matplotlib is not installed" in result.stderr
    assert not (tmp_path / "run" / "curves.png").exists()


def test_a_terminal_shows_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        command, "Console", lambda **_: Console(file=shown, force_terminal=True, width=120, highlight=False)
    )
    with command._reporting() as (tell, say):
        tell(TrainingProgress(3, 10, 0.5, CompletionScores(0.25, 0.75)))
        say("warning: \x1b[2Jsomething")

    assert "warning: \N{REPLACEMENT CHARACTER}[2Jsomething" in shown.getvalue()
    assert "3/10" in shown.getvalue()
    assert "held out: loss 0.2500, accuracy 0.750" in shown.getvalue()


def test_the_command_line_does_not_import_torch() -> None:
    code = (
        "import sys, server.cli; print([name for name in ('torch', 'peft', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_time_that_is_left_follows_from_the_steps_so_far() -> None:
    assert seconds_left(10, 5.0, 20) == 10.0
    assert seconds_left(0, 5.0, 20) is None  # the first step has just ended
    assert seconds_left(10, 5.0, 0) is None
