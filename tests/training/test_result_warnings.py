"""What is told of a finished training."""

from __future__ import annotations

import pytest

from server.training.result_warnings import result_warnings
from server.training.scoring import CompletionScores
from server.training.settings import Method

FALLING = [(25, 8.0), (50, 6.0), (75, 4.0), (100, 3.0)]
FLAT = [(25, 0.5), (50, 0.2), (75, 0.11), (100, 0.105)]


def told(
    method: Method = Method.PROMPT_TUNING,
    accuracy: float = 0.9,
    best_step: int = 100,
    losses: list[tuple[int, float]] = FLAT,
) -> list[str]:
    trained = CompletionScores(losses[-1][1], accuracy)
    return result_warnings(
        method, untrained=CompletionScores(12.0, 0.0), trained=trained, best_step=best_step, losses=losses
    )


def test_a_training_that_went_well_is_not_doubted() -> None:
    assert told() == []


def test_no_gain_is_all_that_is_told_of_it() -> None:
    (text,) = told(best_step=0, accuracy=0.0, losses=FALLING)
    assert "no improvement over the untrained prompt" in text


@pytest.mark.parametrize(
    ("method", "has_other"), [(Method.PROMPT_TUNING, True), (Method.CPT, True), (Method.PREFIX_TUNING, False)]
)
def test_answers_that_are_never_right_to_the_letter(method: Method, has_other: bool) -> None:
    (text,) = told(method, accuracy=0.0)
    assert "no held-out row is answered exactly" in text
    assert "from 12 to 0.105" in text
    assert ("p_tuning_v2" in text) is has_other


def test_a_loss_that_was_still_falling() -> None:
    (text,) = told(losses=FALLING)
    assert "still falling at the end, by 25%" in text


@pytest.mark.parametrize("losses", [[(100, 3.0)], [*FALLING, (125, 3.1)], [(100, 3.0), (110, 2.0)]])
def test_one_that_was_not_or_of_which_too_little_is_known(losses: list[tuple[int, float]]) -> None:
    assert told(losses=losses) == []
