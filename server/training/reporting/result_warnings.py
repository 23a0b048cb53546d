"""Warnings about a finished training, with advice."""

from __future__ import annotations

from collections.abc import Sequence

from server.training.scoring import CompletionScores
from server.training.settings import Method

MAX_LATE_FALL = 0.1
"""If the held-out loss fell by more than this share in the last quarter of the steps, training was too short."""


def result_warnings(
    method: Method,
    *,
    untrained: CompletionScores,
    trained: CompletionScores,
    best_step: int,
    losses: Sequence[tuple[int, float]],
) -> list[str]:
    """Warnings about a finished training; empty if there are none.

    Args:
        method: How it was trained.
        untrained: Scores before the first step.
        trained: Scores of the saved soft prompt or adapter.
        best_step: Step of the saved state.
        losses: (step, held-out loss) of each evaluation, in order.
    """
    what = "prompt" if method.is_soft_prompt else "adapter"
    if best_step == 0:
        return [
            f"no improvement over the untrained {what}, which was saved. Try another --learning-rate, "
            "more steps or more data"
        ]
    found = []
    if trained.accuracy == 0.0:
        text = (
            f"no held-out row is answered exactly, although the loss fell from {untrained.loss:.3g} to "
            f"{trained.loss:.3g}: every token of an answer must be the most likely. Train for more --epochs, or "
            "with a higher --learning-rate"
        )
        if method.is_soft_prompt and not method.is_key_values:
            text += "; or use --method p_tuning_v2 or prefix_tuning, which are stronger on small models"
        found.append(text)
    if (fall := _late_fall(losses)) > MAX_LATE_FALL:
        found.append(
            f"the held-out loss was still falling at the end, by {fall:.0%} in the last quarter of the steps: "
            "train for more --epochs"
        )
    return found


def _late_fall(losses: Sequence[tuple[int, float]]) -> float:
    """Share by which the loss fell in the last quarter of the steps; 0 if the last evaluation is not the best."""
    if len(losses) < 2:
        return 0.0
    last_step, last = losses[-1]
    if last > min(loss for _, loss in losses):
        return 0.0
    before = [loss for step, loss in losses if step <= 0.75 * last_step]
    return (before[-1] - last) / before[-1] if before and before[-1] > 0 else 0.0
