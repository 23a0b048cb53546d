"""A training that diverges goes back to its best state and halves the rate, or ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.training import trainer as trainer_module
from server.training.errors import InstabilityError
from server.training.rates.divergence import SizeLimit
from server.training.run_directory import RunDirectory
from server.training.scoring import CompletionScores, completion_loss
from server.training.settings import Method
from tests.training.conftest import Heard, MakeSettings, Trained

pytestmark = pytest.mark.slow

GOOD, BAD = None, "the soft prompt is too large"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What is found at each evaluation, in order; after the last one nothing."""
    faults: list[str | None] = []
    monkeypatch.setattr(SizeLimit, "fault", lambda *_: faults.pop(0) if faults else None)
    return faults


def rates(folder: Path) -> dict[int, float]:
    """The rate of each step."""
    return {entry["step"]: entry["learning_rate"] for entry in RunDirectory(folder).records() if "loss" in entry}


@pytest.fixture
def improving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation is better than all before."""
    losses = iter(range(1000, 0, -1))

    def scored(*_: Any, **__: Any) -> CompletionScores:
        return CompletionScores(1e-4 * next(losses), 0.5)

    monkeypatch.setattr(trainer_module, "score", scored)


def test_the_training_continues_from_the_best_state_at_half_the_rate(
    settings: MakeSettings, trained: Trained, heard: Heard, script: list[str | None], improving: None, tmp_path: Path
) -> None:
    trained(settings(run_dir=tmp_path / "steady", max_steps=8))
    script += [GOOD, GOOD, BAD]
    result = trained(settings(max_steps=8))

    assert [line for line in heard if "half the rate" in line] == [
        f"warning: step 6: {BAD}: the training diverges at the rate 0.03. It continues from step 4 at half the rate"
    ]
    steady, halved = rates(tmp_path / "steady"), rates(tmp_path / "run")
    assert list(halved) == list(range(1, 9))
    assert [halved[step] / steady[step] for step in (2, 4)] == [1.0, 1.0]
    assert [halved[step] / steady[step] for step in (5, 6, 7)] == pytest.approx([0.5] * 3)
    assert (result["steps"], result["learning_rate"]) == (8, 0.015)
    assert {"step": 4, "halvings": 1} in RunDirectory(tmp_path / "run").records()


def test_a_resumed_training_keeps_the_halved_rate(
    settings: MakeSettings,
    trained: Trained,
    script: list[str | None],
    improving: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained(settings(run_dir=tmp_path / "steady", max_steps=8))
    script += [GOOD, BAD]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        own = RunDirectory.keep_checkpoints

        def stop(directory: RunDirectory, best_step: int | None) -> None:
            own(directory, best_step)
            if best_step == 6:
                raise KeyboardInterrupt

        patched.setattr(RunDirectory, "keep_checkpoints", stop)
        trained(settings(max_steps=8))
    result = trained(settings(max_steps=8, resume=True))

    assert result["learning_rate"] == 0.015
    steady, halved = rates(tmp_path / "steady"), rates(tmp_path / "run")
    assert [halved[step] / steady[step] for step in (3, 6, 7)] == pytest.approx([0.5] * 3)


def test_after_three_halvings_the_best_state_is_saved(
    settings: MakeSettings, trained: Trained, heard: Heard, script: list[str | None], improving: None, tmp_path: Path
) -> None:
    script += [GOOD, BAD, BAD, BAD, BAD]
    result = trained(settings(max_steps=8))

    assert (result["best_step"], result["learning_rate"]) == (2, 0.03 / 8)
    assert heard.count(f"warning: step 4: {BAD}: the training diverges at the rate 0.00375. The training ends here, "
                       "with the best state, of step 2") == 1  # fmt: skip
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_loss_that_is_never_finite_ends_the_training(
    settings: MakeSettings, trained: Trained, heard: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = completion_loss
    monkeypatch.setattr(trainer_module, "completion_loss", lambda *args, **kwargs: own(*args, **kwargs) * math.nan)

    with pytest.raises(InstabilityError, match=r"step 1: the loss is nan.*Lower --learning-rate"):
        trained(settings())
    assert sum("It continues from step 0 at half the rate" in line for line in heard) == 3
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("method", "rate", "what"), [(Method.PROMPT_TUNING, 1e4, "mean norm is"), (Method.LORA, 100.0, "changes are")]
)
def test_too_large_values_are_a_divergence(
    settings: MakeSettings, trained: Trained, heard: Heard, method: Method, rate: float, what: str
) -> None:
    try:
        trained(settings(method=method, learning_rate=rate, warmup_ratio=0.0))
    except InstabilityError as error:
        heard.append(str(error))
    found = [line for line in heard if "the training diverges at the rate" in line]
    assert found
    assert what in found[0]


def test_only_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)

    def write(*steps: int) -> None:
        for step in steps:
            folder = directory.checkpoints / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))

    def kept() -> Iterator[int]:
        return iter(sorted(RunDirectory.step_of(folder) for folder in directory.checkpoints.iterdir()))

    write(2, 4, 6, 8)
    directory.keep_checkpoints(4)
    assert list(kept()) == [4, 8]
    write(10, 12)
    directory.keep_checkpoints(0)
    assert list(kept()) == [12]
    write(14, 16, 18)
    directory.keep_checkpoints(None)
    assert list(kept()) == [16, 18]
    assert directory.checkpoint_of(16) == directory.checkpoints / "checkpoint-16"
    assert directory.checkpoint_of(None) == directory.newest_checkpoint() == directory.checkpoints / "checkpoint-18"
    assert directory.checkpoint_of(3) is None
