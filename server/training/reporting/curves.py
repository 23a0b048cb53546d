"""The training curves as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prompt_store.durable import replace_file


def draw_curves(records: Sequence[dict[str, Any]], path: Path, *, title: str) -> bool:
    """Draw loss and accuracy by step.

    Args:
        records: The entries of ``metrics.jsonl``.
        path: The PNG to write.
        title: Title of the figure.

    Returns:
        False if matplotlib is not installed; then nothing is written.
    """
    if find_spec("matplotlib") is None:
        return False
    # Imported here because matplotlib is optional and takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes = figure.subplots()
    steps = [entry for entry in records if "loss" in entry]
    held_out = [entry for entry in records if "eval_loss" in entry]
    loss_axes.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="0.7", label="training loss")
    if held_out:
        at = [entry["step"] for entry in held_out]
        loss_axes.plot(at, [entry["eval_loss"] for entry in held_out], color="tab:blue", label="held-out loss")
        accuracy_axes = loss_axes.twinx()
        accuracies = [entry["eval_accuracy"] for entry in held_out]
        accuracy_axes.plot(at, accuracies, color="tab:orange", label="held-out accuracy")
        accuracy_axes.set_ylim(-0.02, 1.02)
        accuracy_axes.set_ylabel("accuracy")
        accuracy_axes.legend(loc="center right")
    loss_axes.set_yscale("symlog", linthresh=1e-3)
    loss_axes.set_ylim(bottom=0)
    loss_axes.set_xlabel("step")
    loss_axes.set_ylabel("loss, nats per token")
    loss_axes.set_title(title)
    loss_axes.legend(loc="upper right")
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
