"""Whole trainings on a tiny model: they are repeatable and resumable, and report problems."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPT2Config

from server.datasets import digest
from server.training import trainer as trainer_module
from server.training.encoding import Encoder
from server.training.errors import RunDirectoryError, SettingsError, TrainingError
from server.training.peft_methods import mean_norm
from server.training.run_directory import RunDirectory
from server.training.scoring import CompletionScores, score
from server.training.settings import DEFAULTS, Method
from server.training.trainer import is_improvement, num_steps
from tests.support.processes import PRELUDE
from tests.support.waiting import wait_until
from tests.training.conftest import Heard, MakeSettings, Trained, rows, write_rows

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("method", Method)
def test_each_method_trains_and_records_its_settings(
    settings: MakeSettings, trained: Trained, method: Method, tmp_path: Path, base: Any, encoder: Encoder
) -> None:
    made = settings(method=method)
    if method is Method.MULTITASK:
        tasks = write_rows(tmp_path / "tasks.jsonl", rows(12, task_id=0) + rows(12, task_id=1))
        made = settings(method=method, data=tasks)
    result = trained(made)

    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert record["digests"] == {"data": digest(made.data)}
    assert record["settings"]["method"] == method
    assert record["learning_rate"] == DEFAULTS[method].learning_rate
    assert {"torch", "peft", "transformers"} <= record["versions"].keys()
    entries = RunDirectory(tmp_path / "run").records()
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 4
    losses = [result["scores"]["untrained"]["loss"]]
    losses += [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert result["scores"]["trained"]["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_the_curves_are_drawn(settings: MakeSettings, trained: Trained, curves: None, tmp_path: Path) -> None:
    trained(settings())

    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_soft_prompt_has_the_reported_score_in_plain_peft(
    settings: MakeSettings, trained: Trained, base: Any, encoder: Encoder, tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", rows(8))
    result = trained(settings(eval_data=held_out, method=Method.P_TUNING))
    model = PeftModel.from_pretrained(base, result["adapter"])
    examples = [encoder.encode(example) for example in _examples(held_out)]

    scores = score(model, examples, batch_size=8, pad_id=1)

    assert scores.loss == pytest.approx(result["scores"]["trained"]["loss"], rel=1e-6)
    assert scores.accuracy == result["scores"]["trained"]["accuracy"]


def _examples(path: Path) -> Any:
    from server.datasets import read_examples

    return read_examples(path)


@pytest.mark.parametrize("method", [Method.PROMPT_TUNING, Method.P_TUNING_V2, Method.LORA])
def test_the_same_seed_gives_identical_files(
    settings: MakeSettings, trained: Trained, tmp_path: Path, method: Method
) -> None:
    files = []
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        result = trained(settings(run_dir=tmp_path / run, seed=seed, method=method))
        files.append((Path(result["adapter"]) / WEIGHTS).read_bytes())

    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize("form", ["pairs", "chats"])
def test_pairs_and_conversations_can_be_trained(
    settings: MakeSettings, trained: Trained, tmp_path: Path, form: str
) -> None:
    if form == "pairs":
        data = [{"prompt": row["text"], "completion": "\n" + row["label"]} for row in rows(24)]
    else:
        data = [
            {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
            for row in rows(24)
        ]
    result = trained(settings(data=write_rows(tmp_path / "other.jsonl", data), max_steps=8))

    assert result["scores"]["trained"]["loss"] < result["scores"]["untrained"]["loss"]


@pytest.mark.parametrize("method", [Method.MULTITASK, Method.CARTRIDGE, Method.LORA])
def test_a_model_of_another_family_can_be_trained(
    settings: MakeSettings, trained: Trained, tmp_path: Path, tiny: Path, method: Method
) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny, folder)
    config = GPT2Config(vocab_size=1585, n_embd=32, n_layer=2, n_head=4, n_positions=96, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    data = rows(24, task_id=0) if method is Method.MULTITASK else rows(24)
    made = settings(model=str(folder), method=method, data=write_rows(tmp_path / "rows.jsonl", data), max_steps=8)

    result = trained(made)

    assert result["scores"]["trained"]["loss"] < result["scores"]["untrained"]["loss"]


def test_accumulated_steps_equal_steps_of_one_batch(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    one = trained(settings(run_dir=tmp_path / "one", batch_size=8, max_steps=2, method=Method.CPT))
    four = trained(
        settings(
            run_dir=tmp_path / "four", batch_size=2, gradient_accumulation_steps=4, max_steps=2, method=Method.CPT
        )
    )

    assert four["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    plain = trained(settings(run_dir=tmp_path / "plain"))
    saving = trained(settings(run_dir=tmp_path / "saving", gradient_checkpointing=True))

    assert saving["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)


def test_without_held_out_rows_the_last_state_is_saved(
    settings: MakeSettings, trained: Trained, heard: Heard
) -> None:
    result = trained(settings(eval_fraction=0.0))

    assert result["scores"] == {"bare": None, "untrained": None, "trained": None}
    assert result["best_step"] is None
    assert any("no rows are held out" in line for line in heard)


def test_training_stops_early_and_saves_the_best_state(
    settings: MakeSettings, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter(
        [9.0, 5.0, 4.0, 4.5, 4.4, 4.3, 1.0, 1.0]
    )  # the bare model, the untrained state, evaluations, then the saved state
    monkeypatch.setattr(trainer_module, "score", lambda *_, **__: CompletionScores(next(losses), 0.0))
    next(losses), next(losses)
    result = trained(settings(max_steps=40, patience=3))

    assert result["steps"] == 8
    assert result["best_step"] == 2


def test_without_a_gain_the_untrained_state_is_saved_with_a_warning(
    settings: MakeSettings, trained: Trained, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "score", lambda *_, **__: CompletionScores(1e9, 0.0))
    result = trained(settings())

    assert result["best_step"] == 0
    assert result["scores"]["trained"] == pytest.approx(result["scores"]["untrained"])
    assert any(line.startswith("warning: no improvement over the untrained prompt") for line in heard)


@pytest.mark.parametrize(
    ("scores", "monitor", "gain"),
    [
        (CompletionScores(0.9, 0.1), "loss", True),
        (CompletionScores(1.1, 0.9), "loss", False),
        (CompletionScores(1.1, 0.9), "accuracy", True),
        (CompletionScores(0.9, 0.4), "accuracy", False),
        (CompletionScores(0.9, 0.5), "accuracy", True),
        (CompletionScores(math.nan, 0.5), "loss", False),
    ],
)
def test_a_gain_is_an_improvement_of_the_monitored_score(scores: CompletionScores, monitor: str, gain: bool) -> None:
    assert is_improvement(scores, CompletionScores(1.0, 0.5), monitor) is gain


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": None, "epochs": 2.0, "batch_size": 8}, 6),
        ({"max_steps": None, "epochs": 1.0, "batch_size": 8, "gradient_accumulation_steps": 2}, 2),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    settings: MakeSettings, trained: Trained, changes: dict[str, Any], steps: int
) -> None:
    assert num_steps(settings(**changes), 22) == steps
    assert trained(settings(patience=0, **changes))["steps"] == steps


# Resuming


@pytest.mark.parametrize("method", [Method.P_TUNING, Method.P_TUNING_V2, Method.CPT, Method.LORA])
def test_a_resumed_run_equals_an_uninterrupted_one(
    settings: MakeSettings, trained: Trained, tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption follows step 4's checkpoint. PEFT's files alone could not resume P-tuning and its like."""
    whole = trained(settings(run_dir=tmp_path / "whole", method=method, max_steps=8, patience=0))
    own, calls = mean_norm, []

    def cut(model: PeftModel) -> Any:
        calls.append(1)
        if len(calls) == 4:  # before training, at steps 2 and 4, and now
            raise KeyboardInterrupt
        return own(model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module, "mean_norm", cut)
        trained(settings(method=method, max_steps=8, patience=0))
    resumed = trained(settings(method=method, max_steps=8, patience=0, resume=True))

    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    assert resumed["scores"]["trained"] == pytest.approx(whole["scores"]["trained"], rel=1e-6)
    steps = [entry["step"] for entry in RunDirectory(tmp_path / "run").records() if "loss" in entry]
    assert steps == list(range(1, 9))


def test_kill_9_and_resume_give_the_same_loss(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    whole = trained(settings(run_dir=tmp_path / "whole", max_steps=40, eval_steps=5, patience=0))
    made = settings(max_steps=40, eval_steps=5, patience=0)
    command = [*PRELUDE, "train", "--model", made.model]
    command += ["--data", str(made.data), "--id", "words", "--run-dir", str(made.run_dir), "--device", "cpu"]
    command += ["--num-virtual-tokens", "4", "--max-steps", "40", "--batch-size", "8", "--eval-steps", "5"]
    command += ["--patience", "0"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_until(lambda: process.poll() is not None or RunDirectory(made.run_dir).newest_checkpoint(), 60)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (made.run_dir / "result.json").exists()

    resumed = trained(settings(max_steps=40, eval_steps=5, patience=0, resume=True))

    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert resumed["scores"]["trained"]["loss"] == pytest.approx(whole["scores"]["trained"]["loss"], rel=1e-5)


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for step, text in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        folder = directory.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "trainer_state.json").write_text(text)

    assert directory.newest_checkpoint() == directory.checkpoints / "checkpoint-2"


def test_resuming_without_a_checkpoint_starts_again(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    made = settings()
    whole = trained(settings(run_dir=tmp_path / "whole"))
    record = json.loads((tmp_path / "whole" / "settings.json").read_text())
    record["settings"]["run_dir"] = str(made.run_dir)
    directory.path.mkdir()
    directory.write("settings.json", record)
    directory.metrics.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')

    assert trained(settings(resume=True))["train_loss"] == whole["train_loss"]
    assert [entry["step"] for entry in directory.records() if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 0.0, "max_steps": 40, "patience": 2}])
def test_a_run_interrupted_after_its_last_step_ends_normally(
    settings: MakeSettings, trained: Trained, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = trained(settings(**changes))
    (tmp_path / "run" / "result.json").unlink()

    resumed = trained(settings(**changes, resume=True))

    assert resumed["scores"] == whole["scores"]
    assert resumed["best_step"] == whole["best_step"]
    assert whole["steps"] == 4
    assert whole["steps"] <= resumed["steps"] <= whole["steps"] + 1


def test_a_finished_run_is_not_repeated(settings: MakeSettings, trained: Trained, heard: Heard) -> None:
    first = trained(settings())
    again = trained(settings(resume=True))

    assert again == first
    assert any("contains a completed training" in line for line in heard)


def test_a_run_directory_is_not_shared(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="contains no run to resume"):
        trained(settings(resume=True))
    trained(settings())
    with pytest.raises(RunDirectoryError, match="is not empty: choose another"):
        trained(settings())
    with pytest.raises(RunDirectoryError, match=r"contains a run with other settings: seed was 0 and is 5"):
        trained(settings(resume=True, seed=5))
    record = json.loads((tmp_path / "run" / "settings.json").read_text())
    with (
        directory.locked(record, resume=True),
        pytest.raises(RunDirectoryError, match="in use by another process"),
    ):
        trained(settings(resume=True))


def test_a_run_with_changed_data_cannot_be_resumed(settings: MakeSettings, trained: Trained, data: Path) -> None:
    trained(settings())
    data.write_text(data.read_text() + '{"text": "new", "label": "call"}\n')

    with pytest.raises(RunDirectoryError, match="contains a run with other settings: data was '[0-9a-f]{64}' and is"):
        trained(settings(resume=True))


def test_an_unwritable_run_directory_is_an_error(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(RunDirectoryError, match="cannot be written: Not a directory"):
        trained(settings(run_dir=tmp_path / "file" / "run"))


# Errors of settings and of the disk


def test_settings_that_do_not_fit_the_model_are_refused(
    settings: MakeSettings, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="num_virtual_tokens is 96, but the context has only 96 tokens"):
        trained(settings(num_virtual_tokens=96))
    with pytest.raises(TrainingError, match="has no config.json"):
        trained(settings(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot be loaded"):
        trained(settings(model=str(tmp_path)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):  # a run that failed before its first step leaves the directory usable
        with pytest.raises(SettingsError, match="no CUDA device was found"):
            trained(settings(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_virtual_tokens": 0}, "it must be at least 1"),
        ({"method": Method.CARTRIDGE, "num_virtual_tokens": 1}, "nothing would be trained"),
        ({"method": Method.P_TUNING_V2, "gradient_checkpointing": True}, "cannot be used with p_tuning_v2"),
        ({"method": Method.P_TUNING, "init_text": "a"}, "init_text cannot be used with p_tuning"),
        ({"method": Method.LORA, "init_text": "a"}, "init_text cannot be used with lora"),
        ({"method": Method.LORA, "rank": 0}, "rank is 0; it must be at least 1"),
        ({"method": Method.LORA, "lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"method": Method.LORA, "lora_dropout": 1.0}, "lora_dropout is 1; it must be at least 0 and less than 1"),
        ({"init_text": "  "}, "init_text is empty"),
        ({"description": "a" * 5000}, "description has 5000 characters"),
    ],
)
def test_contradicting_settings_are_refused(
    settings: MakeSettings, trained: Trained, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingsError, match=reason):
        trained(settings(**changes))


def test_a_training_in_bfloat16_keeps_the_soft_prompt_in_float32(settings: MakeSettings, trained: Trained) -> None:
    from safetensors.torch import load_file

    result = trained(settings(dtype="bfloat16"))

    (rows_,) = load_file(Path(result["adapter"]) / WEIGHTS).values()
    assert rows_.dtype == torch.float32
    assert result["scores"]["trained"]["loss"] < result["scores"]["untrained"]["loss"]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device. Free some space",
        ),
        (SafetensorError("I/O error: No space left on device"), "No space left on device. Free some space"),
        (
            RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64"),
            "cannot be written: .enforce",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower --batch-size"),
    ],
)
def test_full_disk_and_memory_errors_give_advice(
    settings: MakeSettings, trained: Trained, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(trainer_module, "save_state", fail)
    with pytest.raises(TrainingError, match=reason):
        trained(settings())
    monkeypatch.undo()
    monkeypatch.setattr("server.training.run.draw_curves", lambda *_, **__: True)
    assert trained(settings(resume=True))["steps"] == 4


def test_other_errors_of_torch_are_raised(
    settings: MakeSettings, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer_module, "save_state", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trained(settings())


def test_after_a_full_disk_at_the_start_the_same_command_works(
    settings: MakeSettings, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="cannot be written: No space"):
        patch.setattr(os, "fsync", fail)
        trained(settings())
    assert trained(settings())["steps"] == 4


def test_trainer_uses_one_gpu_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = trainer_module._OneDeviceArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(arguments, "_n_gpu", 4)
    assert super(trainer_module._OneDeviceArguments, arguments).n_gpu == 4, "transformers stores the number elsewhere"
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, arguments.per_device_train_batch_size)
