"""Warnings about a finished training."""

from __future__ import annotations

import pytest

from server.training.reporting.result_warnings import result_warnings
from server.training.scoring import CompletionScores
from server.training.settings import Method

FALLING = [(25, 8.0), (50, 6.0), (75, 4.0), (100, 3.0)]
FLAT = [(25, 0.5), (50, 0.2), (75, 0.11), (100, 0.105)]


def warnings_of(
    method: Method = Method.PROMPT_TUNING,
    accuracy: float = 0.9,
    best_step: int = 100,
    losses: list[tuple[int, float]] = FLAT,
) -> list[str]:
    trained = CompletionScores(losses[-1][1], accuracy)
    return result_warnings(
        method, untrained=CompletionScores(12.0, 0.0), trained=trained, best_step=best_step, losses=losses
    )


def test_a_good_training_has_no_warning() -> None:
    assert warnings_of() == []


def test_without_a_gain_there_is_only_one_warning() -> None:
    (text,) = warnings_of(best_step=0, accuracy=0.0, losses=FALLING)
    assert "no improvement over the untrained prompt" in text


@pytest.mark.parametrize(
    ("method", "has_other"), [(Method.PROMPT_TUNING, True), (Method.CPT, True), (Method.PREFIX_TUNING, False)]
)
def test_no_exact_answer_is_a_warning(method: Method, has_other: bool) -> None:
    (text,) = warnings_of(method, accuracy=0.0)
    assert "no held-out row is answered exactly" in text
    assert "from 12 to 0.105" in text
    assert ("p_tuning_v2" in text) is has_other


def test_a_loss_that_still_falls_is_a_warning() -> None:
    (text,) = warnings_of(losses=FALLING)
    assert "still falling at the end, by 25%" in text


@pytest.mark.parametrize("losses", [[(100, 3.0)], [*FALLING, (125, 3.1)], [(100, 3.0), (110, 2.0)]])
def test_a_rising_or_unknown_loss_is_no_warning(losses: list[tuple[int, float]]) -> None:
    assert warnings_of(losses=losses) == []
