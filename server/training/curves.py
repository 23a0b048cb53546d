"""The curves of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prompt_store.durable import replace_file


def draw_curves(records: Sequence[dict[str, Any]], path: Path, *, title: str) -> bool:
    """Draw loss and accuracy by step.

    Args:
        records: The metrics, as ``metrics.jsonl`` has them.
        path: The PNG.
        title: What stands above.

    Returns:
        Whether there is a picture: without matplotlib there is none.
    """
    if find_spec("matplotlib") is None:
        return False
    # Not at the top: matplotlib need not be there, and takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    of_loss = figure.subplots()
    steps = [entry for entry in records if "loss" in entry]
    held_out = [entry for entry in records if "eval_loss" in entry]
    of_loss.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="0.7", label="training loss")
    if held_out:
        at = [entry["step"] for entry in held_out]
        of_loss.plot(at, [entry["eval_loss"] for entry in held_out], color="tab:blue", label="held-out loss")
        of_accuracy = of_loss.twinx()
        accuracies = [entry["eval_accuracy"] for entry in held_out]
        of_accuracy.plot(at, accuracies, color="tab:orange", label="held-out accuracy")
        of_accuracy.set_ylim(-0.02, 1.02)
        of_accuracy.set_ylabel("accuracy")
        of_accuracy.legend(loc="center right")
    of_loss.set_yscale("symlog", linthresh=1e-3)
    of_loss.set_ylim(bottom=0)
    of_loss.set_xlabel("step")
    of_loss.set_ylabel("loss, nats a token")
    of_loss.set_title(title)
    of_loss.legend(loc="upper right")
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
