"""The search of a learning rate: what is tried, what is kept, and what wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.training.errors import InstabilityError, SettingsError
from server.training.rates.search import find_rate, rates_around
from server.training.run_directory import RunDirectory
from server.training.settings import TrainSettings
from tests.training.conftest import Heard, MakeSettings, Trained, rows, write_rows


class Scripted:
    """A trainer whose held-out loss depends on the rate; None diverges."""

    def __init__(self, settings: TrainSettings, losses: dict[float, float | None], started: list[float]) -> None:
        self.best_step = 1
        self.best_loss = losses[settings.rate]
        self._rate, self._started = settings.rate, started

    def start(self, checkpoint: Path | None) -> None:
        assert checkpoint is None
        self._started.append(self._rate)
        if self.best_loss is None:
            raise InstabilityError("diverged")


def found(settings: TrainSettings, folder: Path, losses: dict[float, float | None], said: list[str]) -> Any:
    started: list[float] = []
    rate = find_rate(
        settings, 100, RunDirectory(folder), lambda short, _: Scripted(short, losses, started), said.append
    )
    return rate, started


def test_rates_are_spaced_around_the_middle() -> None:
    assert rates_around(1e-2, 5) == [1e-2, 3.16e-3, 3.16e-2, 1e-3, 1e-1]
    assert rates_around(3e-3, 1) == [3e-3]


def test_the_rate_of_the_lowest_loss_wins_and_a_divergent_one_never(settings: MakeSettings, tmp_path: Path) -> None:
    said: list[str] = []
    losses = {1e-2: 0.5, 3.16e-3: 0.4, 3.16e-2: None}
    assert found(settings(learning_rate=1e-2, search=3), tmp_path, losses, said)[0] == 3.16e-3
    assert json.loads((tmp_path / "search.json").read_text()) == {"0.01": 0.5, "0.00316": 0.4, "0.0316": None}
    assert said[-1] == "rate 0.0316: diverges"
    assert "rate 0.01: held-out loss 0.5000 after 25 steps" in said
    assert not (tmp_path / "search").exists()


def test_a_resumed_search_tries_only_what_is_left(settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text('{"0.01": 0.3}')
    rate, started = found(settings(learning_rate=1e-2, search=3), tmp_path, {3.16e-3: 0.4, 3.16e-2: 0.6}, [])
    assert (rate, started) == (1e-2, [3.16e-3, 3.16e-2])


def test_a_search_without_a_usable_rate_is_an_error(settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="diverges at every rate: 0.01, 0.00316"):
        found(settings(learning_rate=1e-2, search=2), tmp_path, {1e-2: None, 3.16e-3: None}, [])


@pytest.mark.slow
def test_the_training_uses_the_rate_that_was_found(
    settings: MakeSettings, trained: Trained, heard: Heard, tmp_path: Path
) -> None:
    result = trained(settings(max_steps=8, learning_rate=1e-4, search=3))

    losses = json.loads((tmp_path / "run" / "search.json").read_text())
    assert list(losses) == ["0.0001", "3.16e-05", "0.000316"]
    assert result["search"] == losses
    assert result["learning_rate"] == float(min(losses, key=lambda rate: losses[rate]))
    assert f"training at the rate {result['learning_rate']:g}" in heard
    assert len([entry for entry in RunDirectory(tmp_path / "run").records() if "loss" in entry]) == 8


def test_a_search_without_held_out_rows_is_refused(settings: MakeSettings, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="search needs held-out rows"):
        settings(search=2, eval_fraction=0.0).check()
    few = write_rows(tmp_path / "few.jsonl", rows(5))
    with pytest.raises(SettingsError, match="search needs held-out rows, and the data has too few"):
        trained(settings(data=few, search=2))
